"""What vLLM's connector calls the chunks of a request: the hash of a chunk's last block, and its KV cache group."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.v1.kv_offload.base import make_offload_key

from impala_vllm.core.allocator import Key

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Names:
    """Of chunks of `blocks_per_chunk` hashed blocks each, in one group."""

    def __init__(self, blocks_per_chunk: int, group: int) -> None:
        self._step = blocks_per_chunk
        self._suffix = make_offload_key(b"", group)
        """What makes a block hash an offload key."""

    def same(self, request: "Request", known: Sequence[Key]) -> int:
        """How many of `known`, the chunks of some turn, are the request's too, root first. O(log chunks).

        A hash names all that stands before it: where two chunks are equal, so are those before them.
        """
        hashes, step, suffix = request.block_hashes, self._step, self._suffix
        num = min(len(known), len(hashes) // step)
        return bisect_left(range(num), True, key=lambda i: known[i] != hashes[(i + 1) * step - 1] + suffix)

    def all(self, request: "Request", known: Sequence[Key]) -> list[Key]:
        """The request's full chunks; `known` are the first of them. O(the others), quick for the known ones."""
        step, suffix = self._step, self._suffix
        return [*known, *(digest + suffix for digest in request.block_hashes[(len(known) + 1) * step - 1 :: step])]

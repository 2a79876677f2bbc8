"""How far along a chain of chunks the tiers reach. A key is whatever names a chunk."""

from collections.abc import Callable, Sequence
from itertools import islice, takewhile
from typing import TypeVar

from impala_vllm.core.planner import NOTHING, Below

K = TypeVar("K")


def leading(keys: Sequence[K], has: Callable[[K], bool], start: int = 0) -> int:
    """Index behind the leading run of chunks from `start` on that a tier has. O(run); quick where `has` is a built-in.

    A search would not do: tiers lose the tail of a chain first, but one that is filled while room is made has holes.
    """
    return start + sum(1 for _ in takewhile(has, islice(keys, start, None)))


def below(
    keys: Sequence[K],
    start: int,
    tokens_per_chunk: int,
    host: Callable[[K], bool],
    nvme: Callable[[K], bool],
    known: Below = NOTHING,
) -> Below:
    """What lies below HBM of a chain of which HBM has the first `start` chunks.

    `known`, an answer for the whole chain, says what need not be looked at again.
    """
    in_host = leading(keys, host, max(start, known.host_tokens // tokens_per_chunk))
    behind = leading(keys, nvme, in_host)
    backed = leading(keys, nvme, known.backed_tokens // tokens_per_chunk)
    return Below((in_host - start) * tokens_per_chunk, (behind - in_host) * tokens_per_chunk, backed * tokens_per_chunk)

"""KV of silent programs that nobody may take: what policies with a time to live hold on to."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica


class Pins:
    """References of its own to a program's blocks."""

    def __init__(self, replica: "Replica") -> None:
        self._replica = replica
        self._blocks: dict[str, list[int]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._blocks

    def __iter__(self):
        return iter(list(self._blocks))

    def __len__(self) -> int:
        return len(self._blocks)

    def pin(self, name: str, keys: Sequence[int]) -> None:
        """Hold what is in HBM of a chain."""
        pool = self._replica.pool
        blocks = pool.find(keys, len(keys))
        pool.touch(blocks)
        self._blocks[name] = blocks

    def unpin(self, name: str) -> None:
        """Let go; not pinned: nothing changes."""
        blocks = self._blocks.pop(name, None)
        if blocks is not None:
            self._replica.pool.release(blocks)

"""KV of silent programs that nobody may take, in HBM or in host: what policies that decide by program hold on to."""

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


class HostPins:
    """The same of copies in host, until they are loaded: a swap space inside a cache."""

    def __init__(self, replica: "Replica") -> None:
        self._replica = replica
        self._keys: dict[str, Sequence[int]] = {}

    def pin(self, name: str, keys: Sequence[int]) -> None:
        """Hold what host has of a chain's beginning."""
        tiers = self._replica.tiers
        if tiers is not None:
            held = self._keys[name] = keys[: tiers.num_ready(keys)]
            tiers.host.pin(held)

    def unpin(self, name: str) -> None:
        """Let go; not pinned: nothing changes."""
        tiers, keys = self._replica.tiers, self._keys.pop(name, ())
        if tiers is not None:
            tiers.host.unpin(keys)

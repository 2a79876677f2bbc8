"""The contract of an index: what it is told, what it answers. `naive` is the specification."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from impala_vllm.fleet.places import BlockKey, Replica, Tier


@dataclass(frozen=True, slots=True)
class IndexConfig:
    """Bounds of an index."""

    ttl_s: float = 6 * 3600.0
    """A block nobody stored or touched for this long is forgotten: what a lost removal leaves behind goes too. An
    engine tells of a block once, so a shorter time would forget stems that are still there."""
    max_bytes: int = 1 << 30
    """Beyond it the blocks stored longest ago go first. About 10 M blocks. What they took is given back over some calls
    of `expire`, so that none of them takes long: meanwhile there is a little more."""


class Depths(NamedTuple):
    """Leading blocks of a prompt that a replica has, down to each tier. Never falls from left to right."""

    hbm: int
    host: int
    """In HBM or host."""
    nvme: int
    """In HBM, host or NVMe."""
    remote: int
    """Anywhere within its reach."""


class Stats(NamedTuple):
    """How much there is."""

    num_blocks: int
    """Distinct blocks."""
    num_copies: int
    """Over all replicas and tiers. Several copies in one tier count as one."""
    num_bytes: int
    """Memory in use, estimated."""
    num_forgotten: int
    """Blocks dropped for age or room, ever."""
    num_unheld: int
    """Removals of blocks that were not known to be there, ever."""


class Index(Protocol):
    """One writer; `prefixes` may be called meanwhile from another thread."""

    def store(self, replica: Replica, tier: Tier, keys: Sequence[BlockKey], now: float) -> None:
        """One copy more of each."""
        ...

    def remove(self, replica: Replica, tier: Tier, keys: Sequence[BlockKey]) -> None:
        """One copy less of each; the block is held as long as one is left. What is not held changes nothing."""
        ...

    def clear(self, replica: Replica, tier: Tier | None = None) -> None:
        """Forget all copies of a replica, or those in one tier."""
        ...

    def touch(self, keys: Sequence[BlockKey], now: float) -> None:
        """Those that are known are as good as stored now."""
        ...

    def expire(self, now: float) -> None:
        """Forget what is too old, and what there is no room for. Call now and then."""
        ...

    def prefixes(self, chain: Sequence[BlockKey]) -> Mapping[Replica, Depths]:
        """How much of a prompt, root first, each replica holds; those that hold nothing may be left out.

        Exact where a replica's copies have no hole along the chain, as eviction from the tail leaves them. Across
        a hole an answer may be too long, but its last block is held.
        """
        ...

    def holds(self, replica: Replica, key: BlockKey) -> frozenset[Tier]:
        """The tiers in which a replica holds a block."""
        ...

    def num_replicas(self, key: BlockKey) -> int:
        """Replicas that hold a block within the server: how replicated a stem is."""
        ...

    def stats(self) -> Stats:
        """Sizes and counts. O(1)."""
        ...

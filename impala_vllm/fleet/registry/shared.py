"""An index that remembers what others have not been told yet, and takes in what they tell. No I/O here.

What goes between routers is the state of a block, not its changes: a byte with the tiers that hold it. Telling it
twice, or late, does no harm.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from impala_vllm.fleet.index import Depths, Index, MaskIndex, Stats
from impala_vllm.fleet.places import BlockKey, Replica, Tier


class Held(NamedTuple):
    """One block of one replica."""

    key: BlockKey
    tiers: int
    """Bit t: tier t holds it. 0: it is gone."""


class SharedIndex(Index):
    """All questions are answered from `local`. Used on one thread."""

    def __init__(self, local: MaskIndex | None = None) -> None:
        self.local = local or MaskIndex()
        self.heard: set[Replica] = set()
        """Replicas known from others; a word from their own events ends that."""
        self._unsaid: dict[Replica, set[BlockKey]] = {}
        """Of the replicas that are told to others: blocks that have changed."""
        self._renewed: set[Replica] = set()
        """Of them: what was told before is void."""

    def store(self, replica: Replica, tier: Tier, keys: Sequence[BlockKey], now: float) -> None:
        self._own_word(replica)
        self.local.store(replica, tier, keys, now)
        self._note(replica, keys)

    def remove(self, replica: Replica, tier: Tier, keys: Sequence[BlockKey]) -> None:
        self._own_word(replica)
        self.local.remove(replica, tier, keys)
        self._note(replica, keys)

    def clear(self, replica: Replica, tier: Tier | None = None) -> None:
        self.heard.discard(replica)
        self.local.clear(replica, tier)
        if replica in self._unsaid:
            self._renewed.add(replica)

    def touch(self, keys: Sequence[BlockKey], now: float) -> None:
        self.local.touch(keys, now)
        for replica in self._unsaid:
            self._note(replica, [key for key in keys if self.local.tiers(replica, key)])

    def expire(self, now: float) -> None:
        self.local.expire(now)

    def prefixes(self, chain: Sequence[BlockKey]) -> Mapping[Replica, Depths]:
        return self.local.prefixes(chain)

    def holds(self, replica: Replica, key: BlockKey) -> frozenset[Tier]:
        return self.local.holds(replica, key)

    def num_replicas(self, key: BlockKey) -> int:
        return self.local.num_replicas(key)

    def stats(self) -> Stats:
        return self.local.stats()

    def begin_telling(self, replica: Replica) -> None:
        """From now on changes are remembered; all of it is to be told first."""
        self._unsaid[replica] = set()
        self._renewed.add(replica)

    def end_telling(self, replica: Replica) -> None:
        """Somebody else tells of it, or nobody."""
        self._unsaid.pop(replica, None)
        self._renewed.discard(replica)

    def take_renewed(self) -> set[Replica]:
        """Replicas of which everything must be told. The caller goes through `everything` after this."""
        renewed, self._renewed = self._renewed, set()
        for replica in renewed:
            self._unsaid[replica] = set()
        return renewed

    def take_unsaid(self, replicas: Collection[Replica]) -> dict[Replica, list[Held]]:
        """Of these, the changed blocks as they are now; those of others wait. O(changed)."""
        found: dict[Replica, list[Held]] = {}
        for replica in replicas:
            keys = self._unsaid.get(replica)
            if keys and replica not in self._renewed:
                found[replica] = [Held(key, self.local.tiers(replica, key)) for key in keys]
                self._unsaid[replica] = set()
        return found

    def everything(self, replicas: set[Replica]) -> Iterator[dict[Replica, list[Held]]]:
        """All blocks of these replicas, in portions between which others may run; what changes meanwhile is unsaid."""
        for portion in self.local.portions(replicas):
            yield {replica: [Held(*held) for held in blocks] for replica, blocks in portion.items()}

    def hear(self, replica: Replica, blocks: Iterable[Held], now: float) -> None:
        """Somebody says how these blocks of a replica are now. Ignored where its own events speak."""
        if replica not in self.heard:
            return
        come: dict[Tier, list[BlockKey]] = {tier: [] for tier in Tier}
        gone: dict[Tier, list[BlockKey]] = {tier: [] for tier in Tier}
        same: list[BlockKey] = []
        # The last word on a block counts: what is compared below is the index before any of them.
        for key, tiers in dict(blocks).items():
            before = self.local.tiers(replica, key)
            if before == tiers and tiers:
                same.append(key)
            for tier in Tier:
                if (before ^ tiers) >> tier & 1:
                    (come if tiers >> tier & 1 else gone)[tier].append(key)
        for tier in Tier:
            if come[tier]:
                self.local.store(replica, tier, come[tier], now)
            if gone[tier]:
                self.local.remove(replica, tier, gone[tier])
        self.local.touch(same, now)

    def begin_hearing(self, replica: Replica) -> None:
        """Others tell of it, from the beginning: nothing that was told before is believed. `hear` follows, in parts."""
        self.local.clear(replica)
        self.heard.add(replica)

    def unhear(self, replica: Replica) -> None:
        """What others said of it is no longer believed."""
        if replica in self.heard:
            self.heard.discard(replica)
            self.local.clear(replica)

    def _own_word(self, replica: Replica) -> None:
        if replica in self.heard:
            self.unhear(replica)

    def _note(self, replica: Replica, keys: Sequence[BlockKey]) -> None:
        unsaid = self._unsaid.get(replica)
        if unsaid is not None:
            unsaid.update(keys)

"""The specification: a counter a place, walked block by block. Right by inspection, slow and large."""

from collections import Counter
from collections.abc import Mapping, Sequence

from impala_vllm.fleet.index.base import Depths, IndexConfig, Stats
from impala_vllm.fleet.places import BlockKey, Replica, Tier

BYTES_A_BLOCK = 200


class NaiveIndex:
    """An index as one would write it down."""

    def __init__(self, config: IndexConfig | None = None) -> None:
        self._config = config or IndexConfig()
        self._copies: dict[tuple[Replica, Tier], Counter[BlockKey]] = {}
        self._stored_s: dict[BlockKey, float] = {}
        self._num_forgotten = 0
        self._num_unheld = 0

    def store(self, replica: Replica, tier: Tier, keys: Sequence[BlockKey], now: float) -> None:
        self._copies.setdefault((replica, tier), Counter()).update(keys)
        self._stored_s.update(dict.fromkeys(keys, now))

    def remove(self, replica: Replica, tier: Tier, keys: Sequence[BlockKey]) -> None:
        copies = self._copies.get((replica, tier), Counter())
        for key in keys:
            if key not in copies:
                self._num_unheld += 1
                continue
            copies[key] -= 1
            if copies[key] == 0:
                del copies[key]
                self._forget_if_gone(key)

    def clear(self, replica: Replica, tier: Tier | None = None) -> None:
        for each in [tier] if tier is not None else list(Tier):
            for key in self._copies.pop((replica, each), Counter()):
                self._forget_if_gone(key)

    def touch(self, keys: Sequence[BlockKey], now: float) -> None:
        self._stored_s.update((key, now) for key in keys if key in self._stored_s)

    def expire(self, now: float) -> None:
        old = [key for key, stored_s in self._stored_s.items() if stored_s <= now - self._config.ttl_s]
        for key in old:
            self._drop(key)
        room = self._config.max_bytes // BYTES_A_BLOCK
        for key in sorted(self._stored_s, key=lambda k: self._stored_s[k])[: max(0, len(self._stored_s) - room)]:
            self._drop(key)

    def prefixes(self, chain: Sequence[BlockKey]) -> Mapping[Replica, Depths]:
        found: dict[Replica, Depths] = {}
        for replica in {replica for replica, _ in self._copies}:
            depths = [0] * len(Tier)
            for reach in Tier:
                for key in chain:
                    if not any(tier <= reach for tier in self.holds(replica, key)):
                        break
                    depths[reach] += 1
            if any(depths):
                found[replica] = Depths(*depths)
        return found

    def holds(self, replica: Replica, key: BlockKey) -> frozenset[Tier]:
        return frozenset(tier for tier in Tier if key in self._copies.get((replica, tier), ()))

    def num_replicas(self, key: BlockKey) -> int:
        return len({r for (r, tier), copies in self._copies.items() if key in copies and tier is not Tier.REMOTE})

    def stats(self) -> Stats:
        num_copies = sum(len(copies) for copies in self._copies.values())
        num_blocks = len(self._stored_s)
        return Stats(num_blocks, num_copies, num_blocks * BYTES_A_BLOCK, self._num_forgotten, self._num_unheld)

    def _drop(self, key: BlockKey) -> None:
        for copies in self._copies.values():
            copies.pop(key, None)
        del self._stored_s[key]
        self._num_forgotten += 1

    def _forget_if_gone(self, key: BlockKey) -> None:
        if not any(key in copies for copies in self._copies.values()):
            del self._stored_s[key]

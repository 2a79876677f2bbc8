"""The fast index: one dict entry a block, whatever the number of replicas that hold it.

Blocks of one age that are held in the same places share one `_Group`, which carries the places as a bit mask. A
replica that restarts, a tier that is cleared, an age that is over: each is a change of a few groups, not of
their millions of blocks. A query jumps along a chain in growing strides, and looks closer only where replicas drop
out: the jump search of Dynamo's indexer (https://github.com/ai-dynamo/dynamo), on masks.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from impala_vllm.fleet.index.base import Depths, IndexConfig, Stats
from impala_vllm.fleet.places import BlockKey, Replica, Tier

STRIDE = 64
"""The first jump; as long as nobody drops out, each is twice as long as the one before."""
BYTES_A_BLOCK = 104
"""Measured with `benchmarks/fleet`: the key, its entry, and the room a growing dict leaves."""
NUM_SHARDS = 64
"""Dicts that blocks are spread over: growing or cleaning one of them is short."""
_AGES = 8
"""Ages a time to live is divided into: a block is forgotten up to an eighth of it late."""
_CLEANED_A_TICK = 200_000
"""Entries looked at for forgotten ones in one call of `expire` where there is no room: some 20 ms. The further beyond
the bound, the more: an eighth of it doubles them."""
_BITS = 8
"""Of a mask for each replica: a byte, so that masks are read bytewise. The lower half is used, one bit a tier."""
_ALL_TIERS = 0x0F


class _Group:
    """Blocks of one age, held in the same places. Without places: forgotten blocks that are not cleaned up yet."""

    __slots__ = ("age", "mask", "num_blocks", "reach")

    def __init__(self, age: int, mask: int) -> None:
        self.age = age
        self.num_blocks = 0
        self.put(mask)

    def put(self, mask: int) -> None:
        """Change the places."""
        self.mask = mask
        self.reach = mask | mask << 1 | mask << 2 | mask << 3
        """Bit t of a replica: it holds the blocks in tier t or a nearer one. Upper halves are noise."""


class _Age(NamedTuple):
    number: int
    start_s: float


class MaskIndex:
    """See `Index`. Times of the ages only grow; a clock that goes back is taken to stand still."""

    def __init__(self, config: IndexConfig | None = None) -> None:
        self._config = config or IndexConfig()
        self._shards: list[dict[BlockKey, _Group]] = [{} for _ in range(NUM_SHARDS)]
        self._groups: dict[_Group, None] = {}
        """All that have blocks and places."""
        self._by_places: dict[tuple[int, int], _Group] = {}
        """By age and mask: one of the groups that have them."""
        self._slots: dict[Replica, int] = {}
        self._replicas: list[Replica | None] = []
        self._used = 0
        """Lower halves of all slots."""
        self._further: dict[int, dict[BlockKey, int]] = {}
        """By bit: copies beyond the first. May keep some of blocks that were forgotten."""
        self._ages: deque[_Age] = deque()
        self._num_this_age = 0
        self._num_entries = 0
        self._num_dead = 0
        """Entries of forgotten blocks."""
        self._num_copies = 0
        self._num_forgotten = 0
        self._num_unheld = 0
        self._next_shard = 0

    def store(self, replica: Replica, tier: Tier, keys: Sequence[BlockKey], now: float) -> None:
        age = self._age(now)
        shift = self._slot(replica) * _BITS + tier
        bit = 1 << shift
        further = self._further.get(shift)
        moves: dict[_Group | None, _Group] = {}
        shards = self._shards
        for key in keys:
            shard = shards[key % NUM_SHARDS]
            old = shard.get(key)
            if old is not None and old.mask & bit:
                if further is None:
                    further = self._further.setdefault(shift, {})
                further[key] = further.get(key, 0) + 1
                if old.age == age:
                    continue
            else:
                self._num_copies += 1
                if further:
                    further.pop(key, None)
            new = moves.get(old)
            if new is None:
                new = moves[old] = self._group(age, (old.mask if old is not None else 0) | bit)
            shard[key] = new
            new.num_blocks += 1
            if old is None:
                self._num_entries += 1
            else:
                self._leave(old)
        self._num_this_age += len(keys)

    def remove(self, replica: Replica, tier: Tier, keys: Sequence[BlockKey]) -> None:
        slot = self._slots.get(replica)
        if slot is None:
            self._num_unheld += len(keys)
            return
        shift = slot * _BITS + tier
        bit = 1 << shift
        further = self._further.get(shift)
        for key in keys:
            shard = self._shards[key % NUM_SHARDS]
            old = shard.get(key)
            if old is None or not old.mask & bit:
                self._num_unheld += 1
            elif further and key in further:
                further[key] -= 1
                if not further[key]:
                    del further[key]
            else:
                self._num_copies -= 1
                if old.mask == bit:
                    del shard[key]
                    self._num_entries -= 1
                else:
                    new = shard[key] = self._group(old.age, old.mask ^ bit)
                    new.num_blocks += 1
                self._leave(old)

    def clear(self, replica: Replica, tier: Tier | None = None) -> None:
        slot = self._slots.get(replica)
        if slot is None:
            return
        tiers = list(Tier) if tier is None else [tier]
        for each in tiers:
            self._further.pop(slot * _BITS + each, None)
        bits = sum(1 << each for each in tiers) << slot * _BITS
        for group in [g for g in self._groups if g.mask & bits]:
            self._take(group, bits)
        if tier is None:
            del self._slots[replica]
            self._replicas[slot] = None
            self._used &= ~(_ALL_TIERS << slot * _BITS)

    def touch(self, keys: Sequence[BlockKey], now: float) -> None:
        age = self._age(now)
        for key in keys:
            shard = self._shards[key % NUM_SHARDS]
            old = shard.get(key)
            if old is not None and old.mask and old.age != age:
                new = shard[key] = self._group(age, old.mask)
                new.num_blocks += 1
                self._leave(old)

    def expire(self, now: float) -> None:
        self._age(now)
        lived_s = self._config.ttl_s * (1 + 1 / _AGES)  # since an age's start: then its end is old enough too
        while len(self._ages) > 1 and self._ages[0].start_s + lived_s <= now:
            self._ages.popleft()
        oldest, room = self._ages[0].number, self._config.max_bytes // BYTES_A_BLOCK
        excess = self._num_entries - self._num_dead - room
        for group in sorted(self._groups, key=lambda g: g.age) if excess > 0 else list(self._groups):
            if group.age < oldest or excess > 0:
                excess -= group.num_blocks
                self._num_forgotten += group.num_blocks
                self._take(group, group.mask)
        beyond, num_left = self._num_entries - room, 1
        if beyond > 0:
            num_left = _CLEANED_A_TICK * (room + 8 * beyond) // max(1, room)
        for _ in range(NUM_SHARDS):
            if not self._num_dead or num_left <= 0:
                return
            num_left -= self._clean()

    def prefixes(self, chain: Sequence[BlockKey]) -> Mapping[Replica, Depths]:
        shards, end = self._shards, len(chain)
        group = shards[chain[0] % NUM_SHARDS].get(chain[0]) if end else None
        live = group.reach & self._used if group is not None else 0
        drops: list[tuple[int, int]] = []
        at, stride = 0, STRIDE
        while live and at < end - 1:
            probe = min(at + stride, end - 1)
            key = chain[probe]
            group = shards[key % NUM_SHARDS].get(key)
            lost = live & ~group.reach if group is not None else live
            if lost:
                self._narrow(chain, at, probe, lost, drops)
                live ^= lost
            at, stride = probe, STRIDE if lost else 2 * stride
        if live:
            drops.append((end, live))
        return self._by_replica(drops)

    def holds(self, replica: Replica, key: BlockKey) -> frozenset[Tier]:
        group, slot = self._shards[key % NUM_SHARDS].get(key), self._slots.get(replica)
        if group is None or slot is None:
            return frozenset()
        return frozenset(tier for tier in Tier if group.mask >> slot * _BITS + tier & 1)

    def tiers(self, replica: Replica, key: BlockKey) -> int:
        """As `holds`, as bits: bit t for tier t."""
        group, slot = self._shards[key % NUM_SHARDS].get(key), self._slots.get(replica)
        return 0 if group is None or slot is None else group.mask >> slot * _BITS & _ALL_TIERS

    def portions(self, replicas: Collection[Replica]) -> Iterator[dict[Replica, list[tuple[BlockKey, int]]]]:
        """All blocks of these replicas with their `tiers`, a 64th at a time. The index may change in between."""
        for shard in self._shards:
            found: dict[Replica, list[tuple[BlockKey, int]]] = {replica: [] for replica in replicas}
            held_by: dict[int, list[tuple[list[tuple[BlockKey, int]], int]]] = {}
            shifts = [(self._slots[r] * _BITS, found[r]) for r in replicas if r in self._slots]
            for key, group in shard.items():
                holders = held_by.get(group.mask)
                if holders is None:
                    holders = held_by[group.mask] = [
                        (blocks, tiers) for shift, blocks in shifts if (tiers := group.mask >> shift & _ALL_TIERS)
                    ]
                for blocks, tiers in holders:
                    blocks.append((key, tiers))
            yield {replica: blocks for replica, blocks in found.items() if blocks}

    def num_replicas(self, key: BlockKey) -> int:
        group = self._shards[key % NUM_SHARDS].get(key)
        if group is None:
            return 0
        return (group.reach >> Tier.NVME & self._used & _every_byte(1, len(self._replicas))).bit_count()

    def stats(self) -> Stats:
        num_further = sum(map(len, self._further.values()))
        num_bytes = (self._num_entries + num_further) * BYTES_A_BLOCK
        num_blocks = self._num_entries - self._num_dead
        return Stats(num_blocks, self._num_copies, num_bytes, self._num_forgotten, self._num_unheld)

    def check_invariants(self) -> None:
        """Raise AssertionError if blocks, groups and counts disagree. O(n), for tests."""
        found: dict[_Group, int] = {}
        for number, shard in enumerate(self._shards):
            for key, group in shard.items():
                assert key % NUM_SHARDS == number
                found[group] = found.get(group, 0) + 1
        assert sum(found.values()) == self._num_entries
        assert sum(n for group, n in found.items() if not group.mask) == self._num_dead
        assert sum(n * group.mask.bit_count() for group, n in found.items()) == self._num_copies
        assert {group for group in found if group.mask} == set(self._groups)
        assert all(group.num_blocks == n for group, n in found.items() if group.mask)
        assert all(not group.mask & ~self._used for group in found)
        assert all(self._groups.keys() >= {g} and (g.age, g.mask) == places for places, g in self._by_places.items())

    def _slot(self, replica: Replica) -> int:
        slot = self._slots.get(replica)
        if slot is None:
            if None in self._replicas:
                slot = self._replicas.index(None)
                self._replicas[slot] = replica
            else:
                slot = len(self._replicas)
                self._replicas.append(replica)
            self._slots[replica] = slot
            self._used |= _ALL_TIERS << slot * _BITS
        return slot

    def _age(self, now: float) -> int:
        """The number of the age that is now; begins a new one where it is time, or this one has become large."""
        if not self._ages:
            self._ages.append(_Age(0, now))
        current = self._ages[-1]
        is_over = now - current.start_s >= self._config.ttl_s / _AGES
        if is_over or self._num_this_age * BYTES_A_BLOCK * 2 * _AGES > self._config.max_bytes:
            current = _Age(current.number + 1, max(now, current.start_s))
            self._ages.append(current)
            self._num_this_age = 0
        return current.number

    def _group(self, age: int, mask: int) -> _Group:
        group = self._by_places.get((age, mask))
        if group is None:
            group = self._by_places[age, mask] = _Group(age, mask)
            self._groups[group] = None
        return group

    def _leave(self, group: _Group) -> None:
        """A block has gone from the group."""
        group.num_blocks -= 1
        if not group.mask:
            self._num_dead -= 1
        elif not group.num_blocks:
            self._unlist(group)
            del self._groups[group]

    def _take(self, group: _Group, bits: int) -> None:
        """The group's blocks are no longer in those places."""
        self._unlist(group)
        self._num_copies -= (group.mask & bits).bit_count() * group.num_blocks
        group.put(group.mask & ~bits)
        if not group.mask:
            self._num_dead += group.num_blocks
            del self._groups[group]
        else:
            self._by_places.setdefault((group.age, group.mask), group)

    def _unlist(self, group: _Group) -> None:
        if self._by_places.get((group.age, group.mask)) is group:
            del self._by_places[group.age, group.mask]

    def _clean(self) -> int:
        """Drop the entries of forgotten blocks from the next shard; how many entries it had."""
        number = self._next_shard
        self._next_shard = (number + 1) % NUM_SHARDS
        before = self._shards[number]
        after = {key: group for key, group in before.items() if group.mask}
        self._shards[number] = after
        self._num_entries -= len(before) - len(after)
        self._num_dead -= len(before) - len(after)
        for copies in self._further.values():
            for key in [k for k in copies if k % NUM_SHARDS == number and k not in after]:
                del copies[key]
        return len(before)

    def _narrow(self, chain: Sequence[BlockKey], low: int, high: int, lost: int, drops: list[tuple[int, int]]) -> None:
        """Where places that hold the block at `low`, and not the one at `high`, drop out in between."""
        stack = [(low, high, lost)]
        while stack:
            low, high, lost = stack.pop()
            if high - low == 1:
                drops.append((high, lost))
                continue
            mid = (low + high) // 2
            key = chain[mid]
            group = self._shards[key % NUM_SHARDS].get(key)
            early = lost & ~group.reach if group is not None else lost
            if early:
                stack.append((low, mid, early))
            if early != lost:
                stack.append((mid, high, lost ^ early))

    def _by_replica(self, drops: list[tuple[int, int]]) -> dict[Replica, Depths]:
        found: dict[Replica, Depths] = {}
        replicas = self._replicas
        for depth, mask in drops:
            everywhere = Depths(depth, depth, depth, depth)
            for slot, bits in enumerate(mask.to_bytes(len(replicas), "little")):
                if not bits or (replica := replicas[slot]) is None:
                    continue
                before = everywhere if bits == _ALL_TIERS else found.get(replica, _NOWHERE)
                found[replica] = (
                    before
                    if bits == _ALL_TIERS
                    else Depths(*[depth if bits >> tier & 1 else before[tier] for tier in range(4)])
                )
        return found


_NOWHERE = Depths(0, 0, 0, 0)


def _every_byte(value: int, num_bytes: int) -> int:
    return int.from_bytes(bytes([value]) * num_bytes, "little")

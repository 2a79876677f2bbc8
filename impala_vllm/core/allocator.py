"""Slots of one tier below HBM: which chunk lies in which, and what may happen to it.

A slot's life is one table, `TRANSITIONS`. Whoever reads a slot pins it; whoever fills one reserves it first. Nothing
here chooses victims (`core.chains` does) or moves bytes. One writer.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum
from itertools import filterfalse
from typing import TypeVar

Key = bytes
"""What names a chunk of KV: vLLM's offload key, a block hash and a KV cache group."""

K = TypeVar("K", bound=Key)


class State(Enum):
    """What a slot holds."""

    FREE = "free"
    FILLING = "filling"
    """Reserved; bytes are on their way in and nobody may read them."""
    READY = "ready"
    DOOMED = "doomed"
    """Dropped while bytes still move: the slot is free as soon as they stop."""


TRANSITIONS: dict[tuple[State, str], State] = {
    (State.FREE, "reserve"): State.FILLING,
    (State.FREE, "restore"): State.READY,
    (State.FILLING, "commit"): State.READY,
    (State.FILLING, "abort"): State.FREE,
    (State.FILLING, "doom"): State.DOOMED,
    (State.READY, "evict"): State.FREE,
    (State.READY, "doom"): State.DOOMED,
    (State.DOOMED, "settle"): State.FREE,
}
"""Everything else is a mistake of the caller's and raises AssertionError. Only unpinned slots are evicted."""

_FILLING, _READY = State.FILLING, State.READY
"""Chunks come by the thousand, and to look a member of an enum up is slow."""

_MOVES = {
    verb: [(source, target) for (source, v), target in TRANSITIONS.items() if v == verb] for _, verb in TRANSITIONS
}
"""The table by verb: an enum's hash is slow, too."""


class Pin:
    """Keeps chunks from eviction until `release`, which is idempotent."""

    __slots__ = ("_generation", "_pool", "keys", "slots")

    def __init__(self, pool: "SlotPool", keys: Sequence[Key], slots: Sequence[int], generation: int) -> None:
        self._pool: SlotPool | None = pool
        self._generation = generation
        self.keys = keys
        self.slots = slots

    def release(self) -> None:
        """The bytes are no longer read."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.unpin(self.slots, self._generation)


class SlotPool:
    """Slots 0 to `num_slots` - 1. Every verb costs O(keys given)."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.ready: dict[Key, int] = {}
        """Chunks that may be read, and where they lie. To look at; asked for by the thousand, so there is no method in
        between."""
        self._filling: dict[Key, int] = {}
        self._state = [State.FREE] * num_slots
        self._pins = [0] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._generation = 0

    def __len__(self) -> int:
        """Chunks held, filling ones included."""
        return len(self.ready) + len(self._filling)

    def __contains__(self, key: object) -> bool:
        return key in self.ready or key in self._filling

    @property
    def num_free(self) -> int:
        return len(self._free)

    def keys(self) -> list[Key]:
        """What is held, filling ones last. O(chunks)."""
        return [*self.ready, *self._filling]

    def slot(self, key: Key) -> int | None:
        """Where the chunk is, or will be once it has been filled."""
        slot = self.ready.get(key)
        return self._filling.get(key) if slot is None else slot

    def is_ready(self, key: Key) -> bool:
        return key in self.ready

    def is_filling(self, key: Key) -> bool:
        return key in self._filling

    def is_evictable(self, key: Key) -> bool:
        """Ready and unpinned."""
        return bool(self.evictable((key,)))

    def missing(self, keys: Iterable[K]) -> list[K]:
        """Those of `keys` that are not held, in their order."""
        absent = list(filterfalse(self.ready.__contains__, keys))
        return absent if self._filling.keys().isdisjoint(absent) else [k for k in absent if k not in self._filling]

    def filling(self, keys: Iterable[Key]) -> list[Key]:
        """Those of `keys` whose bytes are on their way in, in their order."""
        filling = self._filling
        return [key for key in keys if key in filling]

    def evictable(self, keys: Iterable[Key]) -> list[Key]:
        """Those of `keys` that are ready and unpinned, in their order."""
        slot_of, pins = self.ready.get, self._pins
        return [key for key in keys if (slot := slot_of(key)) is not None and not pins[slot]]

    def reserve(self, keys: Sequence[Key]) -> list[int] | None:
        """Slots to fill, one for each key, none of which may be held yet. None: too few are free, nothing changed."""
        if len(keys) > len(self._free):
            return None
        first = len(self._free) - len(keys)
        slots = self._free[first:][::-1]
        slot_of = dict(zip(keys, slots, strict=True))
        assert len(slot_of) == len(keys), "a chunk is reserved once"
        assert self.ready.keys().isdisjoint(slot_of), "a chunk is reserved once"
        assert self._filling.keys().isdisjoint(slot_of), "a chunk is reserved once"
        del self._free[first:]
        self._move(slots, "reserve")
        self._filling.update(slot_of)
        return slots

    def restore(self, slot_of: Mapping[Key, int]) -> None:
        """These slots are known to hold these chunks, from an index that survived a restart. O(slots), once."""
        assert not len(self), "only an empty pool is restored"
        self._move(slot_of.values(), "restore")
        self.ready.update(slot_of)
        self._free = [slot for slot in self._free if self._state[slot] is State.FREE]

    def commit(self, keys: Sequence[Key]) -> None:
        """The bytes are there."""
        slots = list(map(self._filling.__getitem__, keys))
        self._move(slots, "commit")
        for key in keys:
            del self._filling[key]
        self.ready.update(zip(keys, slots, strict=True))

    def abort(self, keys: Iterable[Key]) -> None:
        """The bytes will not come, and nothing writes to the slots any more."""
        self._let_go(keys, self._filling, "abort")

    def evict(self, keys: Sequence[Key]) -> list[int]:
        """Free the slots of ready, unpinned chunks, and name them; all or, with an AssertionError, none."""
        assert len(set(keys)) == len(keys), "a chunk is evicted once"
        assert len(self.evictable(keys)) == len(keys), "only ready, unpinned chunks are evicted"
        return self._let_go(keys, self.ready, "evict")

    def pin(self, keys: Sequence[Key]) -> Pin:
        """Protect ready chunks while their bytes are read."""
        slots = [slot for slot in map(self.ready.get, keys) if slot is not None]
        assert len(slots) == len(keys), "only ready chunks are pinned"
        pins = self._pins
        for slot in slots:
            pins[slot] += 1
        return Pin(self, keys, slots, self._generation)

    def unpin(self, slots: Sequence[int], generation: int) -> None:
        """Undo one `pin`; for `Pin.release`."""
        if generation == self._generation:  # a cleared pool forgot its pins
            pins = self._pins
            for slot in slots:
                pins[slot] -= 1

    def clear(self, moving: Collection[Key] = ()) -> list[int]:
        """Forget every chunk. Slots of `moving`, whose bytes are still read or written, are doomed until `settle`.

        Returns the doomed slots. Pins of the time before are void.
        """
        doomed: list[int] = []
        for held, verb in ((self._filling, "abort"), (self.ready, "evict")):
            doomed += [held.pop(key) for key in list(held) if key in moving]
            self._let_go(list(held), held, verb)
        self._move(doomed, "doom")
        self._pins = [0] * self.num_slots
        self._generation += 1
        return doomed

    def settle(self, slots: Iterable[int]) -> None:
        """Nothing moves in these doomed slots any more."""
        listed = list(slots)
        self._move(listed, "settle")
        self._free += listed

    def check_invariants(self) -> None:
        """Raise AssertionError if slots, states and keys disagree. O(slots), for tests."""
        held = {*self.ready.values(), *self._filling.values()}
        assert len(held) == len(self)
        assert len(set(self._free)) == len(self._free)
        assert held.isdisjoint(self._free)
        for slot, state in enumerate(self._state):
            assert (state is State.FREE) == (slot in self._free)
            assert (slot in held) == (state in (_FILLING, _READY))
            assert self._pins[slot] >= 0
            assert state is _READY or not self._pins[slot]
        assert all(self._state[slot] is _READY for slot in self.ready.values())
        assert all(self._state[slot] is _FILLING for slot in self._filling.values())

    def _let_go(self, keys: Iterable[Key], held: dict[Key, int], verb: str) -> list[int]:
        slots = list(map(held.pop, keys))
        self._move(slots, verb)
        self._free += slots
        return slots

    def _move(self, slots: Iterable[int], verb: str) -> None:
        states, moves = self._state, _MOVES[verb]
        (source, target), *others = moves
        for slot in slots:
            if states[slot] is source:
                states[slot] = target
                continue
            state = states[slot]
            found = [to for state_from, to in others if state_from is state]
            if not found:
                raise AssertionError(f"cannot {verb} a slot that is {state.value}")
            states[slot] = found[0]

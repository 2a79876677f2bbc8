"""Slots of one tier below HBM: which chunk lies in which, and what may happen to it.

A slot's life is one table, `TRANSITIONS`. Whoever reads a slot pins it; whoever fills one reserves it first. Nothing
here chooses victims (`core.chains` does) or moves bytes. One writer.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum

Key = bytes
"""What names a chunk of KV: vLLM's offload key, a block hash and a KV cache group."""


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
        self.ready: set[Key] = set()
        """Chunks that may be read. To look at; asked for by the thousand, so there is no method in between."""
        self._slot_of: dict[Key, int] = {}
        self._state = [State.FREE] * num_slots
        self._pins = [0] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._generation = 0

    def __len__(self) -> int:
        """Chunks held, filling ones included."""
        return len(self._slot_of)

    def __contains__(self, key: object) -> bool:
        return key in self._slot_of

    @property
    def num_free(self) -> int:
        return len(self._free)

    def keys(self) -> Collection[Key]:
        """What is held, filling ones included."""
        return self._slot_of.keys()

    def slot(self, key: Key) -> int | None:
        """Where the chunk is, or will be once it has been filled."""
        return self._slot_of.get(key)

    def is_ready(self, key: Key) -> bool:
        return key in self.ready

    def is_filling(self, key: Key) -> bool:
        slot = self._slot_of.get(key)
        return slot is not None and self._state[slot] is _FILLING

    def is_evictable(self, key: Key) -> bool:
        """Ready and unpinned."""
        return key in self.ready and not self._pins[self._slot_of[key]]

    def filling(self, keys: Iterable[Key]) -> list[Key]:
        """Those of `keys` whose bytes are on their way in, in their order."""
        slot_of, states = self._slot_of, self._state
        return [key for key in keys if key in slot_of and states[slot_of[key]] is _FILLING]

    def evictable(self, keys: Iterable[Key]) -> list[Key]:
        """Those of `keys` that are ready and unpinned, in their order."""
        ready, slot_of, pins = self.ready, self._slot_of, self._pins
        return [key for key in keys if key in ready and not pins[slot_of[key]]]

    def reserve(self, keys: Sequence[Key]) -> list[int] | None:
        """Slots to fill, one for each key, none of which may be held yet. None: too few are free, nothing changed."""
        if len(keys) > len(self._free):
            return None
        first = len(self._free) - len(keys)
        slots = self._free[first:][::-1]
        slot_of = dict(zip(keys, slots, strict=True))
        assert len(slot_of) == len(keys), "a chunk is reserved once"
        assert self._slot_of.keys().isdisjoint(slot_of), "a chunk is reserved once"
        del self._free[first:]
        self._move(slots, "reserve")
        self._slot_of.update(slot_of)
        return slots

    def restore(self, slot_of: Mapping[Key, int]) -> None:
        """These slots are known to hold these chunks, from an index that survived a restart. O(slots), once."""
        assert not self._slot_of, "only an empty pool is restored"
        self._move(slot_of.values(), "restore")
        self._slot_of.update(slot_of)
        self.ready.update(slot_of)
        self._free = [slot for slot in self._free if self._state[slot] is State.FREE]

    def commit(self, keys: Sequence[Key]) -> None:
        """The bytes are there."""
        self._move([self._slot_of[key] for key in keys], "commit")
        self.ready.update(keys)

    def abort(self, keys: Iterable[Key]) -> None:
        """The bytes will not come, and nothing writes to the slots any more."""
        self._let_go(keys, "abort")

    def evict(self, keys: Sequence[Key]) -> None:
        """Free the slots of ready, unpinned chunks; all of them or, with an AssertionError, none."""
        assert len(self.evictable(keys)) == len(keys), "only ready, unpinned chunks are evicted"
        self._let_go(keys, "evict")
        self.ready.difference_update(keys)

    def pin(self, keys: Sequence[Key]) -> Pin:
        """Protect ready chunks while their bytes are read."""
        assert self.ready.issuperset(keys), "only ready chunks are pinned"
        slots = list(map(self._slot_of.__getitem__, keys))
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
        doomed = [slot for key, slot in self._slot_of.items() if key in moving]
        self._move(doomed, "doom")
        states = self._state
        for verb, state in (("abort", _FILLING), ("evict", _READY)):
            self._let_go([key for key, slot in self._slot_of.items() if states[slot] is state], verb)
        self._slot_of.clear()
        self.ready.clear()
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
        held = set(self._slot_of.values())
        assert len(held) == len(self._slot_of)
        assert len(set(self._free)) == len(self._free)
        assert held.isdisjoint(self._free)
        for slot, state in enumerate(self._state):
            assert (state is State.FREE) == (slot in self._free)
            assert (slot in held) == (state in (_FILLING, _READY))
            assert self._pins[slot] >= 0
            assert state is _READY or not self._pins[slot]
        assert self.ready == {key for key, slot in self._slot_of.items() if self._state[slot] is _READY}

    def _let_go(self, keys: Iterable[Key], verb: str) -> None:
        slots = [self._slot_of.pop(key) for key in keys]
        self._move(slots, verb)
        self._free += slots

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

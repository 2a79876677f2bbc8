"""Slots of a tier: any run of verbs agrees with a naive model, and what the table lacks is refused."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from impala_vllm.core.allocator import TRANSITIONS, Key, Pin, SlotPool, State

NUM_SLOTS = 6
NAMES = [bytes([65 + i]) for i in range(9)]
some_keys = st.lists(st.sampled_from(NAMES), max_size=NUM_SLOTS + 1, unique=True)


class Modelled(RuleBasedStateMachine):
    """A pool beside what it should be: a state and a number of pins for each key, and slots that wait to settle."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(NUM_SLOTS)
        self.states: dict[Key, State] = {}
        self.pins: list[tuple[Pin, list[Key]]] = []
        self.void: list[Pin] = []
        self.slot_of: dict[Key, int] = {}
        self.doomed: list[int] = []

    def num_pins(self, key: Key) -> int:
        return sum(key in keys for _, keys in self.pins)

    @rule(keys=some_keys)
    def reserve(self, keys: list[Key]) -> None:
        fresh = [key for key in keys if key not in self.states]
        slots = self.pool.reserve(fresh)
        if len(fresh) > NUM_SLOTS - len(self.states) - len(self.doomed):
            assert slots is None
            return
        assert slots is not None
        assert len(set(slots)) == len(slots) == len(fresh)
        assert set(slots).isdisjoint(self.slot_of.values())
        assert set(slots).isdisjoint(self.doomed)
        self.slot_of.update(zip(fresh, slots, strict=True))
        self.states.update(dict.fromkeys(fresh, State.FILLING))

    @rule(keys=some_keys)
    def restore(self, keys: list[Key]) -> None:
        if not self.states and not self.doomed:
            slot_of = {key: NUM_SLOTS - 1 - index for index, key in enumerate(keys[:NUM_SLOTS])}
            self.pool.restore(slot_of)
            self.slot_of.update(slot_of)
            self.states.update(dict.fromkeys(slot_of, State.READY))

    @rule(keys=some_keys)
    def commit(self, keys: list[Key]) -> None:
        filling = [key for key in keys if self.states.get(key) is State.FILLING]
        self.pool.commit(filling)
        self.states.update(dict.fromkeys(filling, State.READY))

    @rule(keys=some_keys)
    def abort(self, keys: list[Key]) -> None:
        filling = [key for key in keys if self.states.get(key) is State.FILLING]
        self.pool.abort(filling)
        self._gone(filling)

    @rule(keys=some_keys)
    def evict(self, keys: list[Key]) -> None:
        held = [key for key in keys if key in self.states]
        if all(self.states[key] is State.READY and not self.num_pins(key) for key in held):
            self.pool.evict(held)
            self._gone(held)
        else:
            with pytest.raises(AssertionError):
                self.pool.evict(held)  # all or none: the invariant sees to it that nothing has changed

    @rule(keys=some_keys)
    def pin(self, keys: list[Key]) -> None:
        ready = [key for key in keys if self.states.get(key) is State.READY]
        pin = self.pool.pin(ready)
        assert list(pin.slots) == [self.slot_of[key] for key in ready]
        self.pins.append((pin, ready))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.pins:
            pin, _ = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
            pin.release()
            pin.release()

    @rule(data=st.data())
    def release_a_pin_of_before_a_clear(self, data: st.DataObject) -> None:
        if self.void:
            self.void.pop(data.draw(st.integers(0, len(self.void) - 1))).release()

    @rule(moving=some_keys)
    def clear(self, moving: list[Key]) -> None:
        still = {self.slot_of[key] for key in moving if key in self.states}
        doomed = self.pool.clear(set(moving))
        assert set(doomed) == still
        self.doomed += doomed
        self.void += [pin for pin, _ in self.pins]
        self.pins.clear()
        self._gone(list(self.states))

    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        if self.doomed:
            self.pool.settle([self.doomed.pop(data.draw(st.integers(0, len(self.doomed) - 1)))])

    @invariant()
    def agrees(self) -> None:
        pool = self.pool
        pool.check_invariants()
        assert len(pool) == len(self.states)
        assert set(pool.keys()) == self.states.keys()
        assert pool.num_free == NUM_SLOTS - len(self.states) - len(self.doomed)
        for key in NAMES:
            state = self.states.get(key)
            assert (key in pool) == (state is not None)
            assert pool.is_ready(key) == (state is State.READY)
            assert pool.is_filling(key) == (state is State.FILLING)
            assert pool.is_evictable(key) == (state is State.READY and not self.num_pins(key))
            assert pool.slot(key) == self.slot_of.get(key)

    def _gone(self, keys: list[Key]) -> None:
        for key in keys:
            del self.states[key], self.slot_of[key]


TestModelled = Modelled.TestCase
TestModelled.settings = settings(max_examples=40, stateful_step_count=30)


def in_state(state: State) -> tuple[SlotPool, int]:
    """A pool of one slot, which is in this state; it belongs, or belonged, to key `a`."""
    pool = SlotPool(1)
    if state is not State.FREE:
        pool.reserve([b"a"])
    if state is State.READY:
        pool.commit([b"a"])
    if state is State.DOOMED:
        pool.clear({b"a"})
    return pool, 0


def do(pool: SlotPool, slot: int, verb: str) -> None:
    """The verb, on the only slot."""
    if verb == "reserve":
        assert pool.reserve([b"b"]) is not None
    elif verb == "restore":
        pool.restore({b"b": slot})
    elif verb == "doom":
        assert pool.clear({b"a"}) == [slot]
    elif verb == "settle":
        pool.settle([slot])
    else:
        getattr(pool, verb)([b"a"])


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("verb", sorted({verb for _, verb in TRANSITIONS}))
def test_a_slot_does_what_the_table_says_and_nothing_else(state: State, verb: str) -> None:
    pool, slot = in_state(state)
    if (state, verb) in TRANSITIONS:
        do(pool, slot, verb)
        after = TRANSITIONS[state, verb]
        assert pool.num_free == (after is State.FREE)
        assert len(pool) == (after in (State.FILLING, State.READY))
        pool.check_invariants()
    else:
        with pytest.raises((AssertionError, KeyError)):
            do(pool, slot, verb)


@pytest.mark.parametrize("state", [State.FREE, State.FILLING, State.DOOMED])
def test_only_what_is_ready_is_pinned(state: State) -> None:
    pool, _ = in_state(state)
    with pytest.raises((AssertionError, KeyError)):
        pool.pin([b"a"])
    pool.check_invariants()


def test_a_pin_of_before_a_clear_does_not_touch_the_slots_next_owner() -> None:
    pool = SlotPool(1)
    pool.reserve([b"a"])
    pool.commit([b"a"])
    before = pool.pin([b"a"])
    pool.clear()
    pool.reserve([b"b"])
    pool.commit([b"b"])
    pin = pool.pin([b"b"])
    before.release()
    assert not pool.is_evictable(b"b")
    pin.release()
    assert pool.is_evictable(b"b")


def test_a_pool_that_holds_something_is_not_restored() -> None:
    pool = SlotPool(2)
    pool.reserve([b"a"])
    with pytest.raises(AssertionError):
        pool.restore({b"b": 0})


def test_a_chunk_is_reserved_once() -> None:
    pool = SlotPool(2)
    pool.reserve([b"a"])
    with pytest.raises(AssertionError):
        pool.reserve([b"a"])


def test_a_chunk_named_twice_evicts_nothing() -> None:
    pool = SlotPool(2)
    pool.reserve(NAMES[:2])
    pool.commit(NAMES[:2])
    with pytest.raises(AssertionError, match="once"):
        pool.evict([NAMES[0], NAMES[1], NAMES[0]])
    assert set(pool.ready) == set(NAMES[:2])
    pool.check_invariants()

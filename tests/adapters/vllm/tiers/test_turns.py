"""Open turns are forgotten when they are over, not sooner and not later; chains are searched, not walked."""

import random

import pytest

pytest.importorskip("vllm")

from impala_vllm.adapters.vllm.tiers.turns import Turn, Turns
from impala_vllm.core.allocator import Key, SlotPool
from impala_vllm.core.planner import Below
from impala_vllm.core.reach import below, leading
from impala_vllm.core.types import TraceId

A, B = TraceId("a"), TraceId("b")
KEYS = [bytes([i]) for i in range(40)]


def opened(turns: Turns, req_id: str, trace_id: TraceId | None = A, keys: list[Key] = KEYS) -> Turn:
    turn = turns.open(req_id)
    turn.trace_id, turn.keys = trace_id, keys
    turns.remember(turn)
    return turn


def test_a_turn_is_opened_once() -> None:
    turns = Turns(32)
    turn = opened(turns, "r")
    assert turns.open("r") is turn
    assert turns.get("r") is turn
    assert turns.get("another") is None


def test_a_turn_stays_until_it_has_finished_and_nothing_of_it_moves() -> None:
    turns = Turns(32)
    pool = SlotPool(1)
    pool.reserve([b"k"])
    pool.commit([b"k"])
    turn = opened(turns, "r")
    turn.load = pool.pin([b"k"])
    turn.stores.append([b"k"])
    turns.close_if_done("r")
    turn.is_finished = True
    turns.close_if_done("r")
    turn.load = None
    turns.close_if_done("r")
    assert turns.get("r") is turn
    assert turn.stored({b"k"}) == [b"k"]
    turns.close_if_done("r")
    assert turns.get("r") is None
    turns.close_if_done("r")


def test_the_newest_turns_chunks_are_what_the_trace_will_ask_for() -> None:
    turns = Turns(32)
    opened(turns, "r", keys=KEYS[:3])
    opened(turns, "s", keys=KEYS[:5])
    assert list(turns.keys_of(A)) == KEYS[:5]
    assert list(turns.changed_traces) == [A]
    assert list(turns.keys_of(B)) == []
    opened(turns, "t", trace_id=None)
    assert list(turns.changed_traces) == [A]


def test_a_turn_whose_trace_was_forgotten_meanwhile_leaves_nothing_of_it_behind() -> None:
    turns = Turns(32)
    turn, other = opened(turns, "r"), opened(turns, "s", B)
    turn.writes = other.writes = True
    turns.forget(A)
    turns.remember(turn)  # as it ends
    assert list(turns.keys_of(A)) == []
    assert (turn.trace_id, turn.writes) == (None, False)
    assert (other.trace_id, other.writes) == (B, True)
    assert list(turns.keys_of(B)) == KEYS


def test_a_forgotten_trace_is_looked_at_once_more() -> None:
    turns = Turns(32)
    opened(turns, "r")
    turns.changed_traces.clear()
    turns.forget(A)
    assert list(turns.changed_traces) == [A]  # else whoever priced its chunks keeps the price for ever
    turns.changed_traces.clear()
    turns.forget(A)
    assert not turns.changed_traces


def test_a_reset_ends_transfers_and_changes_what_every_trace_has() -> None:
    turns = Turns(32)
    ended, going_on = opened(turns, "r"), opened(turns, "s", B)
    ended.is_finished = True
    for turn in (ended, going_on):
        turn.stores.append(KEYS[:2])
    turns.changed_traces.clear()
    turns.reset()
    assert turns.get("r") is None
    assert turns.get("s") is going_on
    assert going_on.stores == []
    assert set(turns.changed_traces) == {A, B}


@pytest.mark.parametrize("start", [0, 3, 40])
@pytest.mark.parametrize("number", [0, 1, 17, 40])
def test_the_leading_run_is_found(number: int, start: int) -> None:
    there = set(KEYS[:number])
    assert leading(KEYS, there.__contains__, start) == max(start, number)
    assert leading([], there.__contains__) == 0


def test_the_run_ends_at_the_first_hole() -> None:
    there = set(KEYS) - {KEYS[5], KEYS[21]}
    assert [leading(KEYS, there.__contains__, start) for start in (0, 5, 6, 22)] == [5, 5, 21, 40]


def test_what_lies_below_is_counted_from_where_hbm_ends() -> None:
    rng = random.Random(1)
    for _ in range(200):
        start, in_host, in_nvme = rng.randrange(41), rng.randrange(41), rng.randrange(41)
        host, nvme = set(KEYS[:in_host]), set(KEYS[:in_nvme])
        end = max(start, in_host)
        expected = Below(32 * (end - start), 32 * max(0, in_nvme - end), 32 * in_nvme)
        assert below(KEYS, start, 32, host.__contains__, nvme.__contains__) == expected

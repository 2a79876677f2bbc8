"""Whose turns are open, and what their traces teach."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from impala_vllm.core.gaps import GapForecast
from impala_vllm.core.lengths import OutputLengths
from impala_vllm.core.open_turns import OpenTurn, OpenTurns
from impala_vllm.core.types import RequestId, TraceId

A, B = TraceId("a"), TraceId("b")


def table() -> OpenTurns[OpenTurn]:
    return OpenTurns(GapForecast(), OutputLengths())


def arrive(turns: OpenTurns[OpenTurn], name: str, trace_id: TraceId | None, now: float = 0.0) -> OpenTurn:
    turn = OpenTurn(trace_id, now)
    turns.arrive(RequestId(name), turn, 100, now)
    return turn


def finish(turns: OpenTurns[OpenTurn], name: str, now: float = 0.0) -> OpenTurn | None:
    return turns.finish(RequestId(name), 120, 20, "tool", now)


def test_a_trace_runs_when_all_of_its_open_turns_have_begun():
    turns = table()
    first, second = arrive(turns, "1", A), arrive(turns, "2", A)
    assert turns.is_open(A)
    assert turns.begin(first)
    assert not turns.runs(A)
    assert turns.begin(second)
    assert not turns.begin(second)
    assert turns.runs(A)
    finish(turns, "1")
    finish(turns, "2")
    assert not turns.is_open(A)
    assert not turns.runs(A)


def test_the_gap_begins_with_the_last_open_turns_end():
    gaps = GapForecast()
    turns: OpenTurns[OpenTurn] = OpenTurns(gaps, OutputLengths())
    arrive(turns, "1", A)
    arrive(turns, "2", A)
    finish(turns, "1", 5.0)
    assert gaps.silent_s(A, 6.0) is None
    finish(turns, "2", 6.0)
    assert gaps.silent_s(A, 8.0) == 2.0


def test_tokens_are_those_of_the_last_ended_turn():
    turns = table()
    arrive(turns, "1", A)
    assert turns.num_tokens(A) == 100
    finish(turns, "1")
    assert turns.num_tokens(A) == 120
    turns.forget(A)
    assert turns.num_tokens(A) == 0


def test_a_child_and_its_end_change_what_the_parent_is_worth():
    turns = table()
    turns.arrive(RequestId("1"), OpenTurn(B, 0.0), 10, 0.0, parent=A)
    assert set(turns.changed) == {A, B}
    turns.changed.clear()
    turns.drain(A, 1.0)
    assert set(turns.changed) == {A}


def test_a_turn_that_outlives_its_trace_is_nobodys():
    turns = table()
    turn = arrive(turns, "1", A)
    turns.forget(A)
    turns.changed.clear()
    assert turns.trace_of(turn) is None
    assert finish(turns, "1") is turn
    assert not turns.changed
    assert not len(turns)


def test_nobodys_turns_are_remembered_and_count_for_no_trace():
    turns = table()
    turn = arrive(turns, "1", None)
    assert not turns.begin(turn)
    assert not turns.num_traces
    assert finish(turns, "1") is turn
    assert finish(turns, "1") is None


@given(st.lists(st.tuples(st.sampled_from("abf"), st.integers(0, 3), st.integers(0, 7)), max_size=60))
def test_counts_by_trace_are_those_of_the_turns(verbs: list[tuple[str, int, int]]):
    """Begin, arrive and finish in any order."""
    turns, model = table(), dict[str, OpenTurn]()
    for verb, trace, number in verbs:
        name = f"r{number}"
        if verb == "a" and name not in model:
            model[name] = arrive(turns, name, TraceId(f"t{trace}"))
        elif verb == "b" and name in model:
            turns.begin(model[name])
        elif verb == "f":
            assert finish(turns, name) is model.pop(name, None)
    is_open = Counter(t.trace_id for t in model.values())
    queued = Counter(t.trace_id for t in model.values() if not t.has_begun)
    for trace_id in (TraceId(f"t{i}") for i in range(4)):
        assert turns.is_open(trace_id) == bool(is_open[trace_id])
        assert turns.runs(trace_id) == (bool(is_open[trace_id]) and not queued[trace_id])

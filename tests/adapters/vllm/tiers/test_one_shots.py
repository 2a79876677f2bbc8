"""What is counted of traces with one turn, and what no longer is once they come back."""

from impala_vllm.adapters.vllm.tiers.one_shots import OneShots
from impala_vllm.core.types import TraceId

A, B, C = TraceId("a"), TraceId("b"), TraceId("c")


def totals(counts: OneShots) -> tuple[int, int]:
    return counts.num_stored, counts.num_written


def test_a_trace_counts_when_it_has_ended_after_one_turn() -> None:
    counts = OneShots()
    counts.began(A)
    counts.stored(A, 5)
    counts.written(A, 2)
    assert totals(counts) == (0, 0), "it may come back"
    counts.ended(A)
    assert totals(counts) == (5, 2)
    counts.ended(A)
    assert totals(counts) == (5, 2)


def test_a_trace_that_comes_back_never_counts() -> None:
    counts = OneShots()
    counts.began(A)
    counts.stored(A, 5)
    counts.came_back(A)
    counts.written(A, 5)
    counts.ended(A)
    counts.stored(None, 7)
    assert totals(counts) == (0, 0)


def test_at_the_end_whoever_had_one_turn_was_a_one_shot() -> None:
    counts = OneShots()
    for trace_id in (A, B, C):
        counts.began(trace_id)
        counts.stored(trace_id, 1)
    counts.came_back(B)
    counts.end_all()
    assert totals(counts) == (2, 0)

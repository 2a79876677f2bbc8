"""Figures by hand-made runs."""

import pytest

from impala_vllm.replay.load import Run, TurnResult
from impala_vllm.replay.measures import measure, quantile, tasks


def turn(
    session: str, index: int, start: float, end: float, *, tools: float = 0.0, first: float | None = None,
    parent: str | None = None, cached: int = 0, error: str | None = None,
) -> TurnResult:  # fmt: skip
    return TurnResult(
        session, parent, index, f"{session}#{index}", f"r-{session}{index}", start, first, end, tools, 100, 10, cached,
        error,
    )  # fmt: skip


def test_stall_is_completion_time_without_the_gaps() -> None:
    run = Run((turn("a", 0, 1.0, 3.0), turn("a", 1, 8.0, 9.0, tools=5.0)), 8.0)
    (task,) = tasks(run)
    assert (task.jct_s, task.gaps_s, task.stall_s) == (8.0, 5.0, 3.0)


def test_a_child_belongs_to_its_parents_task() -> None:
    run = Run(
        (turn("p", 0, 0.0, 1.0), turn("c", 0, 2.0, 4.0, parent="p"), turn("p", 1, 5.0, 6.0, tools=2.0)),
        6.0,
    )
    (task,) = tasks(run)
    assert (task.num_turns, task.jct_s, task.stall_s) == (3, 6.0, 4.0)


def test_rates_count_what_was_done() -> None:
    run = Run(
        (turn("a", 0, 0.0, 10.0, cached=50), turn("b", 0, 0.0, 36.0), turn("b", 1, 1.0, 2.0, error="HTTP 500")), 36.0
    )
    m = measure(run, computed_tokens=150, new_tokens=120)
    assert (m.num_tasks, m.num_turns, m.num_failed) == (2, 3, 1)
    assert m.tasks_per_hour == pytest.approx(200)
    assert m.cached_share == 0.25
    assert m.recomputed_tokens == 30
    assert m.hit_bound == pytest.approx(0.4)


def test_resume_latency_is_that_of_turns_with_a_predecessor() -> None:
    run = Run((turn("a", 0, 0.0, 9.0, first=8.0), turn("a", 1, 10.0, 11.0, first=10.25)), 11.0)
    assert measure(run).resume_ttft_p50_s == 0.25


def test_what_was_not_counted_stays_unknown() -> None:
    m = measure(Run((turn("a", 0, 0.0, 1.0),), 1.0))
    assert (m.computed_tokens, m.recomputed_tokens, m.hit_bound, m.resume_ttft_p50_s) == (None, None, None, None)


@pytest.mark.parametrize(("q", "value"), [(0.0, 1.0), (0.5, 2.5), (1.0, 4.0), (0.2, 1.6)])
def test_quantiles_interpolate(q: float, value: float) -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], q) == pytest.approx(value)

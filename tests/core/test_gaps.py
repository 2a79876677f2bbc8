"""Gap forecasts: what a survival curve must say, whatever it has learned."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from impala_vllm.core.gaps import GapConfig, GapForecast
from impala_vllm.core.types import TraceId

A, B = TraceId("a"), TraceId("b")


def learned(gaps: list[float], signature: str | None = None, config: GapConfig | None = None) -> GapForecast:
    forecast = GapForecast(config)
    now = 0.0
    for i, gap in enumerate(gaps):
        trace = TraceId(f"teacher{i}")
        forecast.finish(trace, now, signature)
        forecast.resume(trace, now + gap)
    forecast.refresh(now)
    return forecast


def test_a_trace_that_is_not_silent_has_no_forecast() -> None:
    forecast = GapForecast()
    assert forecast.median_remaining_s(A, 1.0) is None
    assert forecast.chance_within(A, 1.0, 1.0) is None
    assert forecast.resume(A, 1.0) is None


def served_for(num_agents: int) -> tuple[GapForecast, float]:
    """A server on which agents of four turns, two seconds apart, come and go, one every second."""
    forecast, start_s = GapForecast(), 0.0
    for number in range(num_agents):
        start_s, agent = float(number), TraceId(f"agent{number}")
        for turn in range(4):
            forecast.finish(agent, start_s + 2.0 * turn, "stop")
            if turn < 3:
                forecast.resume(agent, start_s + 2.0 * (turn + 1))
    forecast.finish(A, start_s, "stop")
    forecast.refresh(start_s)
    return forecast, start_s


def test_agents_that_ended_long_ago_say_nothing_of_those_of_today() -> None:
    """Their gaps are open for ever, those of agents that came back fade: after a day nobody would be expected."""
    (young, soon_s), (old, late_s) = served_for(400), served_for(20_000)
    chance = young.chance_within(A, 3.0, soon_s)
    assert chance is not None
    assert old.chance_within(A, 3.0, late_s) == pytest.approx(chance, abs=0.02)
    for number in range(19_000):  # the table forgets them
        old.forget(TraceId(f"agent{number}"))
    old.refresh(late_s)
    assert old.chance_within(A, 3.0, late_s) == pytest.approx(chance, abs=0.02)


def test_resume_answers_the_length_of_the_gap() -> None:
    forecast = GapForecast()
    forecast.finish(A, 10.0)
    assert forecast.resume(A, 12.5) == 2.5
    assert forecast.silent_s(A, 99.0) is None


def test_the_median_of_equal_gaps_is_that_gap() -> None:
    forecast = learned([4.0] * 200)
    forecast.finish(A, 100.0)
    median = forecast.median_remaining_s(A, 100.0)
    assert median is not None
    assert 2.5 < median < 6.0


def test_a_tool_that_takes_longer_is_expected_later() -> None:
    forecast = GapForecast()
    for i in range(100):
        for signature, gap in (("read", 0.1), ("agent", 60.0)):
            trace = TraceId(f"{signature}{i}")
            forecast.finish(trace, 0.0, signature)
            forecast.resume(trace, gap)
    forecast.refresh(0.0)
    forecast.finish(A, 100.0, "read")
    forecast.finish(B, 100.0, "agent")
    soon, late = forecast.median_remaining_s(A, 100.0), forecast.median_remaining_s(B, 100.0)
    assert soon is not None
    assert late is not None
    assert 20 * soon < late


def test_traces_that_never_come_back_lower_the_odds_while_they_are_waited_for() -> None:
    forecast = learned([1.0] * 20)
    for i in range(50):
        forecast.finish(TraceId(f"gone{i}"), 0.0)
    forecast.finish(A, 100.0)
    forecast.refresh(100.0)
    forecast.finish(B, 100.0)
    chance = forecast.chance_within(B, 60.0, 100.0)
    assert chance is not None
    assert chance < 0.6


def test_an_old_habit_is_forgotten() -> None:
    forecast = GapForecast(GapConfig(memory=50.0))
    for gap, count in ((1.0, 300), (30.0, 300)):
        for i in range(count):
            trace = TraceId(f"{gap}-{i}")
            forecast.finish(trace, 0.0)
            forecast.resume(trace, gap)
    forecast.refresh(0.0)
    forecast.finish(A, 0.0)
    median = forecast.median_remaining_s(A, 0.0)
    assert median is not None
    assert median > 15.0


@given(
    st.lists(st.floats(0.0, 1e5), max_size=60),
    st.floats(0.0, 1e5),
    st.floats(0.0, 1e4),
    st.floats(0.0, 1e4),
)
def test_a_forecast_is_a_distribution(gaps: list[float], idle: float, within: float, further: float) -> None:
    forecast = learned(gaps)
    forecast.finish(A, 0.0)
    first, second = (forecast.chance_within(A, w, idle) for w in (within, within + further))
    median = forecast.median_remaining_s(A, idle)
    assert first is not None
    assert second is not None
    assert median is not None
    assert 0.0 <= first <= second <= 1.0
    assert median >= 0.0
    if median < math.inf:
        at_median = forecast.chance_within(A, median, idle)
        assert at_median is not None
        assert abs(at_median - 0.5) < 1e-6


def test_the_same_facts_give_the_same_forecast() -> None:
    def run() -> list[float | None]:
        rng = random.Random(7)
        forecast, said = GapForecast(), []
        for step in range(300):
            trace = TraceId(str(rng.randrange(20)))
            if forecast.silent_s(trace, float(step)) is not None:
                forecast.resume(trace, float(step))
            else:
                forecast.finish(trace, float(step), rng.choice(["x", "y", None]))
                said.append(forecast.median_remaining_s(trace, step + rng.random()))
            if step % 10 == 0:
                forecast.refresh(float(step))
        return said

    assert run() == run()


def test_quantiles_of_the_wait_are_in_order_and_the_middle_one_is_the_median() -> None:
    forecast = learned([1.0, 2.0, 4.0, 8.0, 16.0] * 40)
    forecast.finish(A, 100.0)
    waits = [forecast.quantile_remaining_s(A, chance, 101.0) for chance in (0.1, 0.25, 0.5, 0.75)]
    assert waits == sorted(w for w in waits if w is not None)
    assert waits[2] == forecast.median_remaining_s(A, 101.0)


@pytest.mark.parametrize("chance", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("idle_s", [0.0, 0.3, 5.0])
def test_a_quantile_is_the_wait_within_which_that_share_is_back(chance: float, idle_s: float) -> None:
    forecast = learned([1.0, 2.0, 4.0, 8.0, 16.0] * 40)
    forecast.finish(A, 100.0)
    wait_s = forecast.quantile_remaining_s(A, chance, 100.0 + idle_s)
    assert wait_s is not None
    assert forecast.chance_within(A, wait_s, 100.0 + idle_s) == pytest.approx(chance, abs=1e-6)


def test_a_trace_that_is_not_silent_has_no_quantiles() -> None:
    assert GapForecast().quantile_remaining_s(A, 0.25, 1.0) is None


def test_the_usual_gap_is_told_while_the_trace_still_speaks() -> None:
    forecast = learned([4.0] * 200)
    usual_s = forecast.usual_s(A)
    assert 2.5 < usual_s < 6.0
    forecast.finish(A, 100.0)
    assert forecast.median_remaining_s(A, 100.0) == pytest.approx(usual_s)


def test_a_trace_with_habits_of_its_own_has_a_usual_gap_of_its_own() -> None:
    forecast = learned([4.0] * 200)
    for i in range(60):
        forecast.finish(A, 100.0 * i)
        forecast.resume(A, 100.0 * i + 40.0)
    forecast.refresh(7000.0)
    assert forecast.usual_s(A) > 3 * forecast.usual_s(B)


def family(forecast: GapForecast, number: int, now: float, work_s: float, back_s: float) -> None:
    """A parent that waits `work_s` for its children and speaks `back_s` after the last of them."""
    parent = TraceId(f"family{number}")
    forecast.finish(parent, now, "task")
    forecast.delegate(parent)
    forecast.drain(parent, now + work_s)
    assert forecast.resume(parent, now + work_s + back_s) == pytest.approx(work_s + back_s)


def test_a_parent_is_expected_late_while_children_live_and_soon_once_they_have_ended() -> None:
    forecast = learned([1.0] * 50)
    for number in range(50):
        family(forecast, number, 0.0, 60.0, 0.2)
    forecast.refresh(0.0)
    forecast.finish(A, 100.0)
    alone = forecast.median_remaining_s(A, 100.0)
    forecast.delegate(A)
    waiting = forecast.median_remaining_s(A, 100.0)
    forecast.drain(A, 130.0)
    drained = forecast.median_remaining_s(A, 130.0)
    assert alone is not None
    assert waiting is not None
    assert drained is not None
    assert drained < 0.5 < alone < 10.0 < 30.0 < waiting < 90.0
    assert forecast.silent_s(A, 131.0) == 31.0, "its silence is as long as it was"
    assert forecast.resume(A, 131.0) == 31.0


def test_children_of_a_trace_that_speaks_or_waits_for_none_change_nothing() -> None:
    forecast = GapForecast()
    forecast.delegate(A)
    forecast.drain(A, 1.0)
    assert forecast.median_remaining_s(A, 1.0) is None
    forecast.finish(A, 10.0)
    before = forecast.median_remaining_s(A, 15.0)
    forecast.drain(A, 12.0)
    assert forecast.median_remaining_s(A, 15.0) == before


def test_a_trace_is_scored_by_its_own_gaps_after_the_same_tool():
    """Whose builds take minutes and whose reads take none is not expected in between after either."""
    forecast, now = GapForecast(), 0.0
    for _ in range(30):
        for name, builds_s in ((TraceId("slow"), 300.0), (TraceId("quick"), 20.0)):
            for tool, gap_s in (("read", 0.1), ("build", builds_s)):
                forecast.finish(name, now, tool)
                now += gap_s
                forecast.resume(name, now)
        forecast.refresh(now)
    medians: dict[tuple[str, str], float] = {}
    for name in ("slow", "quick"):
        for tool in ("read", "build"):
            forecast.finish(TraceId(name), now, tool)
            medians[name, tool] = forecast.median_remaining_s(TraceId(name), now) or 0.0
            forecast.resume(TraceId(name), now)
    assert medians["slow", "read"] < 0.3
    assert medians["quick", "read"] < 0.3
    assert 200.0 < medians["slow", "build"] < 450.0
    assert 12.0 < medians["quick", "build"] < 40.0


def test_a_trace_remembers_its_latest_tools_only():
    forecast = GapForecast(GapConfig(max_trace_signatures=3))
    for i in range(10):
        forecast.finish(TraceId("a"), 10.0 * i, f"tool{i}")
        forecast.resume(TraceId("a"), 10.0 * i + 1.0)
    assert set(forecast._traces[TraceId("a")]) == {None, "tool7", "tool8", "tool9"}


def test_turns_that_nobody_follows_make_their_signature_late_while_they_are_open() -> None:
    """The end of a session says nothing; that most such silences go on does."""
    forecast = GapForecast()
    for i in range(40):
        forecast.finish(TraceId(f"t{i}"), 0.0, "stop")
    for i in range(10):
        forecast.resume(TraceId(f"t{i}"), 5.0)
    forecast.refresh(3600.0)
    forecast.finish(A, 3600.0, "stop")
    within = forecast.chance_within(A, 600.0, 3600.0)
    assert within is not None
    assert 0.15 < within < 0.4

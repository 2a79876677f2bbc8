"""The evaluation of the gap forecast: nothing is known ahead, and what is held is counted right."""

import math
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from click.testing import CliRunner

from benchmarks.sim import gaps
from benchmarks.sim.gaps import EDGES_S, LEVELS, MEDIAN, TTL_S, Forecast, Gap

SESSIONS = Path(__file__).parents[2] / "data" / "sessions.weka.jsonl.zst"
WITHOUT_ENDS = Path(__file__).parents[2] / "data" / "agents.requests.jsonl.zst"


def session(*lengths_s, start_s=0.0, service_s=1.0):
    """Gaps of these lengths, one after the other, and the silence after the last turn."""
    made, now = [], start_s
    for length_s in (*lengths_s, None):
        now += service_s
        made.append(Gap(now, length_s, 100, "tool_use", True))
        now += length_s or 0.0
    return made


def said(length_s, ends_s, tokens=100):
    """A forecast that is sure of `ends_s`; None: never."""
    curve = tuple(float(ends_s is not None and edge >= ends_s) for edge in EDGES_S)
    at_s = EDGES_S[-1] if ends_s is None else ends_s
    medians = (10.0,) * len(LEVELS)
    return Forecast(Gap(0.0, length_s, tokens, None, True), (at_s,) * len(LEVELS), 0.5, curve, medians, medians)


def test_a_forecast_does_not_see_how_long_its_gap_will_be():
    quick = session(1.0, 2.0, 1.0, 2.0, 5.0)
    slow = [*quick[:4], replace(quick[4], length_s=5000.0), quick[5]]
    first, second = (list(gaps.forecasts([s], 1, Random(0))) for s in (quick, slow))
    assert [f.curve for f in first[:4]] == [f.curve for f in second[:4]]
    assert first[0].gap.length_s == 2.0, "nothing has been learned before the first gap"


def test_the_last_silence_of_a_session_is_held_for_and_not_scored():
    made = list(gaps.forecasts([session(1.0, 2.0, 3.0)], 1, Random(0)))
    assert [f.gap.length_s for f in made] == [2.0, 3.0, None]
    assert gaps.score(made)["log error, fixed 300 s"] > 0
    assert all(f.gap.length_s is not None or f.gap.tokens for f in made)


def test_running_medians_are_of_gaps_that_have_ended():
    made = list(gaps.forecasts([session(1.0, 9.0, 3.0)], 1, Random(0)))
    assert [(f.session_s[MEDIAN], f.global_s[MEDIAN]) for f in made] == [(1.0, 1.0), (9.0, 9.0), (3.0, 3.0)]
    assert made[2].session_s == (1.0,) * 3 + (3.0,) * 3 + (9.0,) * 3


def test_every_baseline_has_its_pinball_loss_and_one_that_knows_has_none():
    exact = [replace(said(10.0, 10.0), session_s=(5.0,) * 9, global_s=(20.0,) * 9)]
    found = gaps.score(exact)
    losses = {name: value for name, value in found.items() if name.startswith("pinball")}
    # Off by log 2, below or above: levels lose half of that on average.
    assert list(losses.values()) == pytest.approx([0.0, 0.5 * math.log(2), 0.5 * math.log(2), 0.5 * math.log(30)])
    assert [name.split(", ")[1] for name in losses] == [
        "forecast", "session's quantiles", "global quantiles", "fixed 300 s",
    ]  # fmt: skip


def test_a_forecast_that_knows_holds_what_is_needed_and_no_more():
    made = [said(10.0, 10.0), said(100.0, 100.0), said(None, None), said(4000.0, 4000.0)]
    found = gaps.retained(made)
    fixed = 100 * (10.0 + 100.0 + TTL_S + TTL_S)
    assert found["held with oracle gaps, of the TTL's"] == pytest.approx(100 * 110.0 / fixed)
    assert found["held, of a 300 s TTL's"] == pytest.approx(found["held with oracle gaps, of the TTL's"])
    assert found["hits at that, of the TTL's"] == 1.0


def test_a_forecast_that_says_the_same_of_all_holds_as_a_time_to_live_does():
    curve = tuple(1.0 - 2.0 ** -(edge / 40) for edge in EDGES_S)
    lengths = [*(5.0 * i for i in range(1, 40)), 900.0, None]
    made = [replace(said(length_s, None), curve=curve) for length_s in lengths]
    assert gaps.retained(made)["held, of a 300 s TTL's"] <= 1.0


def test_holding_ends_where_the_next_second_costs_more_than_it_brings():
    quick_or_never = tuple(0.9 if edge >= 1.0 else 0.0 for edge in EDGES_S)
    assert gaps._held_s(quick_or_never, 0.01) == pytest.approx(next(e for e in EDGES_S if e >= 1.0))
    assert gaps._held_s(quick_or_never, 10.0) == 0.0


def test_a_recorded_log_is_scored():
    result = CliRunner().invoke(gaps.main, ["--traces", str(SESSIONS), "--live", "4", "--no-record"])
    assert result.exit_code == 0, result.output
    assert "log error / session's median's" in result.output


@pytest.mark.parametrize("log", [SESSIONS.parent / "none", WITHOUT_ENDS])
def test_no_log_and_no_gaps_are_one_line_and_exit_2(log):
    result = CliRunner().invoke(gaps.main, ["--traces", str(log), "--no-record"])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1

"""The table of idle KV: its total and its order are those of judging everything anew, given time."""

import random

import pytest

from impala_vllm.core.admission import Admission
from impala_vllm.core.chains import Chains
from impala_vllm.core.cost import CostConfig, StepCost
from impala_vllm.core.gaps import GapForecast
from impala_vllm.core.idle import CATCH_UP, FRESH_AT_MOST_S, MAX_JUDGED, IdleKv
from impala_vllm.core.planner import NOTHING, Below, Planner, PlannerConfig
from impala_vllm.core.retention import Retention, RetentionConfig
from impala_vllm.core.types import TraceId

A, B, C = TraceId("a"), TraceId("b"), TraceId("c")


def table(gap_s: float = 2.0, **retention: bool) -> tuple[IdleKv, GapForecast]:
    gaps = GapForecast()
    for i in range(300):
        gaps.finish(TraceId(f"t{i}"), 0.0)
        gaps.resume(TraceId(f"t{i}"), gap_s)
    gaps.refresh(0.0)
    cost = StepCost(CostConfig(prefill_s_per_token=1e-3))
    return IdleKv(gaps, Admission(cost, 300.0), Retention(cost, RetentionConfig(**retention))), gaps


def test_kv_of_a_trace_that_is_soon_back_is_kept() -> None:
    idle, gaps = table()
    gaps.finish(A, 0.0)
    idle.update(A, 10, 1000, False, 0.0)
    assert idle.kept_blocks == 10
    idle.update(A, 4, 1000, False, 0.1)
    assert idle.kept_blocks == 4
    idle.update(A, 0, 1000, False, 0.1)
    assert idle.kept_blocks == 0
    assert len(idle) == 0


def test_a_long_silence_ends_the_keeping_without_any_news() -> None:
    idle, gaps = table()
    gaps.finish(A, 0.0)
    idle.update(A, 10, 1000, False, 0.0)
    now = 0.0
    while now < 60.0:
        now += 0.5
        idle.refresh(now)
    assert idle.kept_blocks == 0


def test_after_a_pause_many_rows_are_caught_up_on_within_a_few_steps() -> None:
    """Nobody waited for an hour: what was kept then is not kept now."""
    idle, gaps = table()
    traces = [TraceId(f"idle{i}") for i in range(500)]
    for trace in traces:
        gaps.finish(trace, 0.0)
        idle.update(trace, 1, 1000, False, 0.0)
    assert idle.kept_blocks == len(traces)
    num_steps = 0
    while idle.kept_blocks:
        num_steps += 1
        idle.refresh(3600.0 + 0.03 * num_steps)
    assert num_steps <= 1 + len(traces) // CATCH_UP


def test_the_kv_of_a_turn_that_waits_is_not_counted_as_kept_and_goes_last() -> None:
    idle, gaps = table()
    for trace in (A, B):
        gaps.finish(trace, 0.0)
        idle.update(trace, 10, 1000, False, 0.0)
    gaps.resume(A, 0.5)
    idle.update(A, 10, 1000, True, 0.5)
    assert idle.kept_blocks == 10
    assert idle.cheapest_first([A, B, C]) == [C, B, A]


def test_without_values_the_longest_silent_goes_first() -> None:
    idle, gaps = table(enabled=False)
    for at_s, trace in ((1.0, B), (2.0, A), (3.0, C)):
        gaps.finish(trace, at_s)
        idle.update(trace, 10, 1000, False, at_s)
    assert idle.cheapest_first([A, B, C]) == [B, A, C]


def test_after_any_news_the_table_agrees_with_judging_everything_anew() -> None:
    rng = random.Random(3)
    idle, gaps = table()
    state: dict[TraceId, tuple[int, int, bool]] = {}
    now = 0.0
    for _ in range(600):
        now += rng.random()
        trace = TraceId(str(rng.randrange(3 * MAX_JUDGED)))
        if rng.random() < 0.5:
            gaps.finish(trace, now)
        else:
            gaps.resume(trace, now)
        state[trace] = (rng.randrange(0, 50), rng.randrange(1, 5000), gaps.silent_s(trace, now) is None)
        idle.update(trace, *state[trace], now)
        idle.refresh(now)
        idle.check_invariants()
    gaps.refresh(now)
    for _ in range(100):  # nothing happens for a while: everything gets its turn
        now += FRESH_AT_MOST_S
        idle.refresh(now)
    anew = IdleKv(gaps, idle._admission, idle._retention)
    for trace, (num_blocks, num_tokens, is_waiting) in state.items():
        anew.update(trace, num_blocks, num_tokens, is_waiting, now)
    assert idle.kept_blocks == anew.kept_blocks
    assert len(idle) == len(anew) == sum(1 for n, _, _ in state.values() if n)


def tiered(gap_s: float = 2.0, nvme_bytes_per_s: float = 5e4) -> tuple[IdleKv, GapForecast, Planner]:
    """A table that prices tiers: a token takes a millisecond to compute, a tenth of that from host, 0.3 from NVMe."""
    _, gaps = table(gap_s)
    cost = StepCost(CostConfig(prefill_s_per_token=1e-3))
    planner = Planner(cost, 10.0, PlannerConfig(host_bytes_per_s=1e5, nvme_bytes_per_s=nvme_bytes_per_s))
    return IdleKv(gaps, Admission(cost, 300.0), Retention(cost), planner), gaps, planner


def test_hbm_goes_first_where_a_tier_below_has_it_too() -> None:
    idle, gaps, _ = tiered(4.0)
    for trace, below in ((A, NOTHING), (B, Below(1000)), (C, Below(0, 1000, 1000))):
        gaps.finish(trace, 0.0)
        idle.update(trace, 10, 1000, False, 0.0, below)
    assert idle.cheapest_first([A, B, C]) == [B, C, A]
    assert idle.kept_blocks == 10, "four seconds are within seven times what computing costs, not what a load does"


def test_host_goes_first_where_nvme_has_it_too_and_nobody_waits() -> None:
    idle, gaps, _ = tiered()
    for trace, below in ((A, Below(1000)), (B, Below(1000, 0, 1000))):
        gaps.finish(trace, 0.0)
        idle.update(trace, 0, 1000, False, 0.0, below)
    assert sorted([A, B, C], key=idle.worth_in_host) == [C, B, A]
    gaps.resume(B, 0.1)
    idle.update(B, 0, 1000, True, 0.1, Below(1000, 0, 1000))
    assert sorted([A, B, C], key=idle.worth_in_host) == [C, A, B], "its turn has come and waits"


def test_a_tier_keeps_what_is_back_sooner() -> None:
    idle, gaps, _ = tiered()
    for trace, at_s in ((A, 0.0), (B, 1.5)):
        gaps.finish(trace, at_s)
    for trace in (A, B):
        idle.update(trace, 0, 1000, False, 1.5, Below(1000, 0, 1000))
    assert sorted([A, B], key=idle.worth_in_host) == [B, A]
    assert sorted([A, B], key=idle.worth_in_nvme) == [B, A]


@pytest.mark.parametrize("nvme_bytes_per_s", [5e4, 5e3])
def test_a_full_disk_gives_up_what_is_silent_for_what_runs_however_slow_it_is(nvme_bytes_per_s: float) -> None:
    idle, gaps, _ = tiered(2.0, nvme_bytes_per_s)  # of 1,000 tokens computed in a second it reads all in 0.3 or 2.1 s
    gaps.finish(A, 0.0)
    idle.update(A, 0, 1000, False, 60.0, Below(0, 1000, 1000))
    idle.update(B, 10, 1000, True, 60.0, is_running=True)
    disk = Chains(4, idle.worth_in_nvme)
    disk.use(A, [])
    disk.add([b"1", b"2", b"3", b"4"], A)
    assert disk.victims(2, lambda keys: keys, only_cheaper_than=B) == [b"4", b"3"]


def test_the_kv_of_a_running_turn_is_for_the_turn_after_it() -> None:
    idle, gaps, planner = tiered()
    idle.update(A, 0, 1000, True, 0.0, Below(1000), True)  # it runs: in HBM, and back after the usual gap
    idle.update(B, 0, 1000, True, 0.0, Below(1000), False)  # it waits for its KV
    assert sorted([A, B], key=idle.worth_in_host) == [A, B]
    usual = planner.worth_in_host(1000, Below(1000), gaps.usual_s(A), False)
    gaps.finish(C, 0.0)
    idle.update(C, 0, 1000, False, 0.0, Below(1000))
    waits = planner.worth_in_host(1000, Below(1000), gaps.median_remaining_s(C, 0.0), False)
    assert usual == pytest.approx(waits)


def test_a_row_stays_while_any_tier_has_something_and_no_longer() -> None:
    idle, gaps, _ = tiered()
    gaps.finish(A, 0.0)
    idle.update(A, 10, 1000, False, 0.0, Below(1000))
    idle.update(A, 0, 1000, False, 0.1, Below(1000))
    assert (len(idle), idle.kept_blocks) == (1, 0)
    idle.update(A, 0, 1000, False, 0.2, Below(0, 0, 1000))
    assert len(idle) == 1
    idle.update(A, 0, 1000, False, 0.3)
    assert len(idle) == 0
    idle.check_invariants()


def test_a_table_without_tiers_prices_none() -> None:
    idle, gaps = table()
    gaps.finish(A, 0.0)
    idle.update(A, 10, 1000, False, 0.0)
    assert sorted([B, A], key=idle.worth_in_host) == [B, A]
    assert sorted([B, A], key=idle.worth_in_nvme) == [B, A]

"""What idle KV is worth, compared pair by pair."""

from impala_vllm.core.cost import CostConfig, StepCost
from impala_vllm.core.retention import SOONEST_S, Holding, Retention, RetentionConfig

COST = StepCost(CostConfig(prefill_s_per_token=1e-3))
WORTH = Retention(COST)


def test_kv_wanted_sooner_is_worth_more() -> None:
    assert WORTH.value(Holding(1000, wait_s=0.2)) > WORTH.value(Holding(1000, wait_s=90.0)) > 0.0


def test_kv_of_a_waiting_turn_is_worth_most() -> None:
    assert WORTH.value(Holding(1000, wait_s=None, is_waiting=True)) >= WORTH.value(Holding(1000, wait_s=0.0))


def test_kv_of_a_trace_nobody_expects_is_worth_nothing() -> None:
    assert WORTH.value(Holding(1000, wait_s=None)) == 0.0


def test_switched_off_the_longest_silent_is_worth_least() -> None:
    by_age = Retention(COST, RetentionConfig(enabled=False))
    old, young = Holding(1000, 0.1, idle_since_s=3.0), Holding(1000, 90.0, idle_since_s=5.0)
    waiting = Holding(1000, None, is_waiting=True)
    assert by_age.value(old) < by_age.value(young) < by_age.value(waiting)


def test_kv_that_a_tier_below_has_is_worth_what_bringing_it_back_costs() -> None:
    computed, loaded = Holding(1000, 2.0), Holding(1000, 2.0, back_s=0.1)
    assert WORTH.value(loaded) == WORTH.value(computed) / 10
    assert WORTH.value(Holding(1000, None, is_waiting=True, back_s=0.1)) == 0.1 / 1000 / SOONEST_S
    assert WORTH.value(Holding(1000, None, back_s=0.1)) == 0.0

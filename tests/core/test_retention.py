"""What idle KV is worth, compared pair by pair."""

from impala_vllm.core.cost import CostConfig, StepCost
from impala_vllm.core.gaps import GapForecast
from impala_vllm.core.retention import Holding, Retention
from impala_vllm.core.types import TraceId

SOON, LATE = TraceId("soon"), TraceId("late")


def retention() -> Retention:
    gaps = GapForecast()
    for i in range(100):
        for signature, gap in (("read", 0.2), ("agent", 90.0)):
            gaps.finish(TraceId(f"{signature}{i}"), 0.0, signature)
            gaps.resume(TraceId(f"{signature}{i}"), gap)
    gaps.refresh(0.0)
    gaps.finish(SOON, 0.0, "read")
    gaps.finish(LATE, 0.0, "agent")
    return Retention(gaps, StepCost(CostConfig(prefill_s_per_token=1e-3)))


def test_kv_wanted_sooner_is_worth_more() -> None:
    worth = retention()
    assert worth.value(Holding(SOON, 1000), 0.0) > worth.value(Holding(LATE, 1000), 0.0) > 0.0


def test_kv_of_a_waiting_turn_is_worth_most() -> None:
    worth = retention()
    assert worth.value(Holding(LATE, 1000, is_waiting=True), 0.0) >= worth.value(Holding(SOON, 1000), 0.0)


def test_kv_of_a_trace_nobody_expects_is_worth_nothing() -> None:
    assert retention().value(Holding(TraceId("gone"), 1000), 0.0) == 0.0

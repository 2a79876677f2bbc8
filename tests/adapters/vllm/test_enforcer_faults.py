"""Where policy fails, its scheduler goes on as stock, says so once and serves everybody."""

import pytest

pytest.importorskip("vllm")

from impala_vllm.core.admission import Plan
from tests.adapters.vllm.batch import Batch
from tests.adapters.vllm.schedulers import build

FALLS_BACK = "impala: policy failed and falls back to stock order, serving continues"


@pytest.fixture
def said(monkeypatch):
    """What the scheduler says of faults."""
    lines: list[str] = []
    monkeypatch.setattr("impala_vllm.adapters.vllm.scheduler.logger.exception", lines.append)
    return lines


def test_a_fault_of_policy_falls_back_to_stock_and_serves_on(model, said):
    scheduler = build(model, mode="enforce", num_blocks=40)
    batch = Batch(scheduler, 20, 3, 2, 40)
    plan, calls = scheduler.enforcer.plan, [0]

    def fail_at_30(now):
        calls[0] += 1
        if calls[0] == 30:
            raise RuntimeError("a bug of ours")
        plan(now)

    scheduler.enforcer.plan = fail_at_30
    batch.check = lambda: None  # type: ignore[method-assign]
    batch.run()
    assert len(batch.served) == 60
    assert scheduler.enforcer is None
    assert said == [FALLS_BACK]


def test_a_fault_amid_vllms_own_step_falls_back_to_stock_and_serves_on(model, said):
    scheduler = build(model, mode="enforce", num_blocks=40)
    batch = Batch(scheduler, 20, 3, 2, 40)
    policy = scheduler.enforcer
    calls = [0]

    def fail(traces):
        calls[0] += 1
        raise RuntimeError("a bug of ours")

    policy.idle.cheapest_first = fail
    batch.check = lambda: None
    batch.run()
    assert calls[0] == 1, "nothing was evicted, or policy went on"
    assert len(batch.served) == 60
    assert scheduler.enforcer is None
    assert said == [FALLS_BACK]


def test_a_fault_while_policy_is_given_up_harms_nobody(model, said):
    scheduler = build(model, mode="enforce", num_blocks=40)
    batch = Batch(scheduler, 20, 3, 2, 40)

    def fail(*_):
        raise RuntimeError("a bug of ours")

    scheduler.enforcer.reset = scheduler.enforcer.asks.ranked = fail
    batch.check = lambda: None
    batch.run()
    assert len(batch.served) == 60
    assert scheduler.enforcer is None
    assert said == [FALLS_BACK, "impala: policy left some of its order behind"]


def test_a_plan_that_admits_nobody_is_given_up_with_a_word(model, said):
    scheduler = build(model, mode="enforce", num_blocks=40)
    scheduler.enforcer.admission.plan = lambda asking, *_: Plan([], len(asking))
    batch = Batch(scheduler, 3, 2, 0, 40)
    batch.check = lambda: None
    batch.run()
    assert len(batch.served) == 6
    assert scheduler.enforcer is None
    assert said == [FALLS_BACK]

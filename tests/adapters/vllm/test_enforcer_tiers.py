"""Policy over vLLM's own connector, whose tiers nobody moves bytes for."""

import pytest

pytest.importorskip("vllm")

from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.request import RequestStatus

from impala_vllm.adapters.vllm import choice
from impala_vllm.adapters.vllm.tiers.manager import TierManager
from impala_vllm.config import load
from tests.adapters.vllm.batch import complete, send
from tests.adapters.vllm.schedulers import from_config


def tiered(model, num_blocks=12):
    """A scheduler over vLLM's own connector, with a host tier that nobody moves bytes for."""
    settings = load(None, {"mode": ("test", "enforce")})
    config = EngineArgs(
        model=model,
        max_model_len=512,
        block_size=32,
        scheduler_cls=choice.Choice.of(settings),
        kv_transfer_config=KVTransferConfig(
            kv_connector="OffloadingConnector",
            kv_role="kv_both",
            kv_connector_extra_config={
                "spec_name": "VirtualSpec",
                "spec_module_path": "benchmarks.virtual.tiers",
                "make_manager": lambda tokens: TierManager(32, 4096, tokens),
            },
        ),
    ).create_engine_config()
    config.scheduler_config.async_scheduling = False
    return from_config(config, num_blocks)


def test_who_waits_for_nvme_is_not_shown_to_a_step_where_nobody_can_tell_what_is_in_reach_either(model):
    scheduler = tiered(model, 100)
    policy = scheduler.enforcer
    policy.asks._group = None  # as with windows alone
    policy.tiers.load = lambda asks, now: [ask for ask in asks if ask.turn.request_id != "reads"]
    for name in ("reads", "computes"):
        send(scheduler, name, [7] * 64)
    assert list(scheduler.schedule().num_scheduled_tokens) == ["computes"]
    assert policy.gate.kept_back() == (frozenset(), frozenset({"reads"}))


def test_samples_of_a_turn_are_no_turns_to_the_tiers(model):
    scheduler = tiered(model, 40)
    manager = scheduler.enforcer.tiers.manager
    for turn in range(2):
        for number in range(3):
            send(scheduler, f"{number}_turn{turn}", [7] * (150 + 40 * turn))
        for _ in range(3):
            complete(scheduler, scheduler.schedule())
    assert not scheduler.running
    assert manager.num_resumes == 1
    assert [len(manager.turns.keys_of(trace.trace_id)) for trace in scheduler.observer.identity.traces] == [5]


def test_weights_that_change_empty_the_tiers_however_often_between_two_steps(model):
    scheduler = tiered(model)
    manager, side = scheduler.enforcer.tiers.manager, scheduler.connector.connector_scheduler
    send(scheduler, "r", [7] * 128)
    complete(scheduler, scheduler.schedule())
    scheduler.schedule()
    assert side._jobs
    assert len(manager.host.pool) > 0
    for _ in range(3):
        scheduler.weights_changed()
        assert (len(manager.host.pool), len(side._jobs)) == (0, 0)
    assert scheduler.reset_connector_cache()


def test_what_hbm_has_of_weights_before_does_not_come_down_again(model):
    scheduler = tiered(model, 40)
    manager = scheduler.enforcer.tiers.manager
    send(scheduler, "before", [7] * 128)
    complete(scheduler, scheduler.schedule())
    scheduler.weights_changed()
    send(scheduler, "after", [7] * 128)  # finds the old blocks, as in stock
    complete(scheduler, scheduler.schedule())
    scheduler.schedule()
    assert len(manager.host.pool) == 0
    assert not scheduler.running
    scheduler.connector.connector_scheduler._jobs.clear()
    assert scheduler.reset_prefix_cache()
    send(scheduler, "fresh", [7] * 128)
    complete(scheduler, scheduler.schedule())
    scheduler.schedule()
    assert len(manager.host.pool) > 0


def test_weights_that_change_while_hbm_is_empty_leave_the_tiers_at_work(model):
    scheduler = tiered(model, 40)
    scheduler.weights_changed()
    send(scheduler, "fresh", [7] * 128)
    complete(scheduler, scheduler.schedule())
    scheduler.schedule()
    assert len(scheduler.enforcer.tiers.manager.host.pool) > 0


def test_a_session_whose_client_thinks_is_no_reason_to_hold_others(model):
    scheduler = tiered(model)
    session = send(scheduler, "session", [7] * 64, resumable=True)
    send(scheduler, "idle", [8] * 128)
    complete(scheduler, scheduler.schedule())
    assert session.status == RequestStatus.WAITING_FOR_STREAMING_REQ
    assert sum(scheduler.enforcer.free.claims().values()) == 4
    scheduler.enforcer.idle.kept_blocks = 4  # expected back in a moment
    send(scheduler, "other", [9] * 192)
    assert list(scheduler.schedule().num_scheduled_tokens) == ["other"]

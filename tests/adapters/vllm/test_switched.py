"""One engine that serves some runs with policy and others as stock vLLM does."""

from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler as SyncScheduler
from vllm.v1.request import Request

from impala_vllm.adapters.vllm import choice, switched
from impala_vllm.adapters.vllm.free_queue import FreeQueue
from impala_vllm.adapters.vllm.waiting_queue import WaitingQueue
from impala_vllm.config import load
from impala_vllm.replay.arms import ARMS
from tests.adapters.vllm.batch import BOTH, complete
from tests.adapters.vllm.schedulers import build, from_config


def switched_scheduler(model: str, asynchronous: bool, mode: str = "enforce") -> Any:
    settings = load(None, {"mode": ("test", mode)})
    args = EngineArgs(model=model, max_model_len=512, block_size=32, scheduler_cls=choice.Choice.of(settings))
    config = args.create_engine_config()
    config.scheduler_config.async_scheduling = asynchronous
    config.scheduler_config.scheduler_cls = switched.Scheduler
    return from_config(config)


def serve(scheduler: Any, salt: str, num_agents: int = 9) -> list[dict[str, int]]:
    """Three turns of each agent, all at once; a turn's prompt follows from the one before. What each step computed."""
    init_none_hash(sha256)
    hasher, steps = get_request_block_hasher(32, sha256), list[dict[str, int]]()
    for turn in range(3):
        for agent in range(num_agents):
            prompt = [7] * 64 + [100 + agent] * (60 + 40 * (agent % 4) + 50 * turn)
            params = SamplingParams(max_tokens=9, temperature=0.0, stop_token_ids=[50])
            name = f"{salt}-a{agent}t{turn}"
            scheduler.add_request(
                Request(name, prompt, params, None, 0, float(turn), cache_salt=salt, block_hasher=hasher)
            )
        while scheduler.has_requests():
            scheduled = scheduler.schedule()
            steps.append({name.removeprefix(salt): n for name, n in scheduled.num_scheduled_tokens.items()})
            complete(scheduler, scheduled)
    return steps


@BOTH
def test_runs_of_a_stock_salt_are_served_as_stock_serves_them(model: str, asynchronous: bool) -> None:
    stock, ours = build(model, asynchronous, mode="off"), build(model, asynchronous, mode="enforce")
    one = switched_scheduler(model, asynchronous)
    expected, with_policy = serve(stock, "run0"), serve(ours, "run0")
    assert expected != with_policy, "the load has to tell them apart"
    for i in range(3):
        assert serve(one, f"run{2 * i}-stock") == expected
        assert type(one.waiting) is not WaitingQueue
        assert type(one.kv_cache_manager.block_pool.free_block_queue) is FreeKVCacheBlockQueue
        served = serve(one, f"run{2 * i + 1}")
        assert i or served == with_policy  # later ones have learnt from earlier ones
        assert type(one.waiting) is WaitingQueue
        queue = one.kv_cache_manager.block_pool.free_block_queue
        assert type(queue) is FreeQueue
        queue.check_invariants()
        assert queue.num_free_blocks == 63


@pytest.mark.parametrize(("asynchronous", "base"), [(False, SyncScheduler), (True, AsyncScheduler)])
def test_nothing_of_ours_runs_in_a_stock_run(
    model: str, asynchronous: bool, base: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = switched_scheduler(model, asynchronous)
    assert isinstance(one, base)
    serve(one, "run0")
    monkeypatch.setattr(one.enforcer, "plan", lambda now: pytest.fail("policy planned"))
    seen = one.observer.spent_ns
    serve(one, "run1-stock")
    assert one.observer.spent_ns == seen


def test_the_arm_of_stock_marks_its_salts_so() -> None:
    assert ARMS["switched-stock"].salt_mark == switched.STOCK
    assert not ARMS["switched-impala"].salt_mark


def test_it_needs_policy_to_compare_with(model: str) -> None:
    with pytest.raises(ValueError, match="mode enforce"):
        switched_scheduler(model, False, mode="observe")

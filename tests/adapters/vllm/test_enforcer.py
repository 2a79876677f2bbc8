"""Policy in vLLM's own scheduler, without a model: everything is served, nothing leaks, under any weather."""

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from impala_vllm.adapters.vllm.watchdog import STALLED_S
from impala_vllm.core.admission import Plan
from tests.adapters.vllm.batch import BOTH, STEP_S, Batch, send
from tests.adapters.vllm.schedulers import build


def serve(model: str, asynchronous: bool, num_blocks: int, num_agents: int, seed: int = 0, **weather: float) -> Batch:
    scheduler = build(model, asynchronous, mode="enforce", num_blocks=num_blocks)
    batch = Batch(scheduler, num_agents, 5, seed, num_blocks)
    batch.run(**weather)
    assert len(batch.served) == 5 * num_agents
    assert scheduler.enforcer.free.num_free_blocks == num_blocks - 1  # the null block is never free
    scheduler.observer.identity.check_invariants()
    return batch


@BOTH
def test_everybody_is_served_with_room_for_everybody(model, asynchronous):
    serve(model, asynchronous, num_blocks=400, num_agents=8)


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_everybody_is_served_with_room_for_three_of_sixty(model, asynchronous, seed):
    serve(model, asynchronous, num_blocks=40, num_agents=60, seed=seed)


@BOTH
def test_aborts_of_held_and_running_turns_leave_nothing_behind(model, asynchronous):
    serve(model, asynchronous, num_blocks=40, num_agents=40, abort_share=0.2)


def test_held_turns_are_told_apart_from_a_lack_of_capacity(model):
    scheduler = build(model, mode="enforce", num_blocks=40)
    batch = Batch(scheduler, 30, 4, 1, 40)
    held = []
    plan = scheduler.enforcer.plan

    def spy(now):
        plan(now)
        held.append(scheduler.enforcer.gate.num_held)
        assert scheduler.enforcer.gate.num_held <= len(scheduler.deferred_waiting)

    scheduler.enforcer.plan = spy
    batch.run()
    assert max(held) > 0


def test_what_the_table_forgets_policy_forgets(model):
    scheduler = build(model, mode="enforce", num_blocks=60)
    batch = Batch(scheduler, 10, 2, 3, 60)
    batch.run()
    assert scheduler.enforcer.free.claims()
    scheduler.observer.identity.tick(batch.now + 1e6)
    assert not scheduler.observer.identity.num_blocks
    assert not scheduler.enforcer.free.claims()
    assert not scheduler.enforcer.free._idle_since
    assert not scheduler.enforcer.turns.num_traces
    scheduler.enforcer.free.check_invariants()


def test_policy_survives_a_pool_that_somebody_else_keeps(model, monkeypatch):
    """As where another engine is slow to fetch the KV of turns that have ended."""
    warned = []
    monkeypatch.setattr("impala_vllm.adapters.vllm.watchdog.logger.warning", lambda text, *_: warned.append(text))
    scheduler = build(model, mode="enforce", num_blocks=40)
    batch = Batch(scheduler, 6, 3, 0, 40)
    pool = scheduler.kv_cache_manager.block_pool
    kept = pool.get_new_blocks(38)
    while batch.now < 4 * STALLED_S:
        batch._arrive()
        batch._step()
        batch.now += STEP_S
    assert not batch.served
    assert len(warned) == 1
    pool.free_blocks(kept)
    batch.run()
    assert len(batch.served) == 18
    assert scheduler.enforcer is not None
    assert not scheduler.enforcer.gate._watchdog.lets_all_through


def test_who_finds_no_room_is_passed_by_all_others_in_turn(model):
    """Three that vLLM cannot place, and one that it can; as where outputs turn out longer than they were thought."""
    scheduler = build(model, mode="enforce", num_blocks=12, rank__enabled=False)
    scheduler.enforcer.admission.plan = lambda asking, *_: Plan(list(asking), 0)
    scheduler.kv_cache_manager.block_pool.get_new_blocks(3)
    for number in range(3):
        send(scheduler, f"large {number}", [10 + number] * 350)
    send(scheduler, "fits", [20] * 100)
    placed = [list(scheduler.schedule().num_scheduled_tokens) for _ in range(4)]
    assert placed == [[], [], [], ["fits"]]


@BOTH
def test_a_cold_stem_that_many_ask_for_at_once_is_computed_once(model, asynchronous):
    stem, own, num_jobs = 384, 64, 8
    scheduler = build(model, asynchronous, mode="enforce", num_blocks=400)
    scheduler.max_num_scheduled_tokens = 96  # the stem takes several steps
    batch = Batch(scheduler, 0, 0, 0, 400)
    for job in range(num_jobs):
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        prompt = [7] * stem + [100 + job] * own
        scheduler.add_request(Request(f"j{job}", prompt, params, None, 0, 0.0, block_hasher=batch._hasher))
    computed = 0
    schedule = scheduler.schedule

    def count(*args):
        nonlocal computed
        output = schedule(*args)
        computed += output.total_num_scheduled_tokens
        return output

    scheduler.schedule = count
    batch._end = lambda request_id, aborted=False: None
    batch._open = {f"j{job}": job for job in range(num_jobs)}
    batch._history = {job: [] for job in range(num_jobs)}
    while scheduler.has_requests():
        batch._step()
        batch.now += STEP_S
    assert computed == stem + num_jobs * own

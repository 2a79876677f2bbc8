"""Whose the blocks are that a turn leaves behind, however late vLLM frees them."""

import pytest

pytest.importorskip("vllm")

from tests.adapters.vllm.batch import STEP_S, Batch, complete, send
from tests.adapters.vllm.schedulers import build


@pytest.mark.parametrize("supersedes", [True, False])
def test_what_a_turn_leaves_of_its_traces_kv_is_nobodys_unless_that_is_switched_off(model, supersedes):
    """A trace goes on from before its last answer: that answer is not kept for it."""
    scheduler = build(model, mode="enforce", num_blocks=100, retention__supersede=supersedes)
    batch = Batch(scheduler, 1, 2, 0, 100)
    batch._history[0], batch._due[0] = [7] * 320, 0.0
    while batch._turns_left[0] == 2:
        batch._arrive()
        batch._step()
        batch.now += STEP_S
    queue = scheduler.enforcer.free
    (trace_id,) = queue.claims()
    assert queue.num_claimed(trace_id) >= 10
    batch._history[0] = [7] * 288 + [9] * 64  # nine of its blocks, then other words
    batch.now = batch._due[0]
    batch._arrive()
    batch._step()
    assert scheduler.enforcer.turns.runs(trace_id)
    assert (queue.num_claimed(trace_id) == 0) == supersedes
    queue.check_invariants()


def test_what_all_samples_of_a_turn_leave_behind_is_its_traces(model):
    scheduler = build(model, mode="enforce", num_blocks=40)
    for number in range(3):  # as vLLM names the children of n=3
        send(scheduler, f"{number}_turn", [7] * 150)
    for _ in range(3):
        complete(scheduler, scheduler.schedule())
    assert not scheduler.has_requests()
    ((_, num_blocks),) = scheduler.enforcer.free.claims().items()
    assert num_blocks >= 4, "a prompt of four full blocks"
    assert scheduler.enforcer.free.num_unclaimed + num_blocks == 39
    assert not scheduler.observer._link_of


def test_what_is_freed_behind_a_step_in_flight_is_still_its_traces(model):
    """As with any connector that loads: a step in flight may still write to the blocks of who has ended."""
    scheduler = build(model, asynchronous=True, mode="enforce")
    scheduler.defer_block_free = True
    requests = [send(scheduler, f"r{i}", [7 + i] * 32 * (2 + i)) for i in range(2)]
    traces = [scheduler.enforcer.trace_of(request) for request in requests]
    steps = [scheduler.schedule(), scheduler.schedule()]
    complete(scheduler, steps[0])
    assert not scheduler.requests
    assert not scheduler.enforcer.free.claims()
    complete(scheduler, steps[1])
    assert scheduler.enforcer.free.claims() == {traces[0]: 2, traces[1]: 3}
    assert not scheduler.enforcer.claims._deferred
    scheduler.enforcer.free.check_invariants()


def test_what_a_connector_keeps_after_the_end_is_still_its_traces(model, monkeypatch):
    """As where KV is sent to another server: blocks are freed when it has arrived."""
    scheduler = build(model, mode="enforce")
    monkeypatch.setattr(scheduler, "_connector_finished", lambda request: (True, None))
    request = send(scheduler, "r", [7] * 64)
    trace_id = scheduler.enforcer.trace_of(request)
    complete(scheduler, scheduler.schedule())
    assert not scheduler.enforcer.free.claims()
    scheduler._free_blocks(request)
    assert scheduler.enforcer.free.claims() == {trace_id: 2}
    assert not scheduler.enforcer.claims._unfreed

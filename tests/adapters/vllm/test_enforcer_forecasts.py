"""What policy learns from turns that end: how long answers and tools take, and when a parent is back."""

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from impala_vllm.core.types import TraceId
from tests.adapters.vllm.schedulers import build


def test_a_turn_that_is_broken_off_says_nothing_of_how_long_answers_are(model):
    scheduler = build(model, mode="enforce", num_blocks=400)
    lengths = scheduler.enforcer.lengths
    before = lengths.expect(None)
    for number in range(50):  # clients that hang up while they are held, and send again
        request = Request(f"r{number}", [7] * 64, SamplingParams(max_tokens=9), None)
        scheduler.add_request(request)
        scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    assert lengths.expect(None) == before


def test_gaps_are_learned_by_tool_from_token_ids(model):
    scheduler = build(model, mode="enforce", num_blocks=400)
    marker = next(iter(scheduler.enforcer._tool_call_tokens))
    policy = scheduler.enforcer
    learned = []
    finish = policy.gaps.finish
    policy.gaps.finish = lambda trace_id, now, signature: (learned.append(signature), finish(trace_id, now, signature))
    for i in range(20):
        request = Request(f"r{i}", [7] * 64, SamplingParams(max_tokens=9), None)
        request.append_output_token_ids([50, marker, 60, 61 + i % 2, 70 + i])
        policy.arrive(request, TraceId(f"t{i}"), float(i))
        policy.finish(request, float(i))
    assert len(set(learned[-6:])) == 2
    assert all(signature.startswith("tool:60.") for signature in learned[-6:])


def test_a_parent_is_expected_once_its_last_child_has_ended(model):
    scheduler = build(model, mode="enforce", num_blocks=400)
    policy, traces = scheduler.enforcer, scheduler.observer.identity.traces
    told = []
    policy.gaps.delegate = lambda trace_id: told.append(("delegate", trace_id))
    policy.gaps.drain = lambda trace_id, now: told.append(("drain", trace_id))

    def send(name, session, parent=None):
        request = Request(name, [7] * 64, SamplingParams(max_tokens=4), None, 0, 0.0)
        request.session_id = session
        scheduler.add_request(request)
        trace_id = policy.trace_of(request)
        if parent is not None:
            traces.adopt(traces.get(trace_id), traces.get(parent))
        return trace_id

    parent = send("p", "parent")
    scheduler.finish_requests("p", RequestStatus.FINISHED_LENGTH_CAPPED)
    children = [send(f"c{i}", f"child{i}", parent) for i in range(2)]
    send("c0b", "child0")
    assert told == [("delegate", parent)]
    for name in ("c0", "c1"):
        scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
    assert told == [("delegate", parent)], "one child still has a turn open"
    scheduler.finish_requests("c0b", RequestStatus.FINISHED_ABORTED)
    assert told == [("delegate", parent), ("drain", parent)]
    assert len(set(children)) == 2

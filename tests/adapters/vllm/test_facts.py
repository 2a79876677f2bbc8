"""vLLM's requests as core is told."""

from types import SimpleNamespace

import pytest

from impala_vllm.adapters.vllm import facts
from impala_vllm.core.types import Namespace, Outcome
from tests.adapters.vllm.fakes import FakeParams, FakeRequest


def test_an_arrival_carries_hashes_namespace_and_session():
    lora = SimpleNamespace(lora_name="a", lora_int_id=2, lora_path="/l")
    params = FakeParams({facts.CALLER_KEY: {"tenant": "t", "session": "s", "parent": "p"}})
    request = FakeRequest("r-1", [b"x", b"y"], cache_salt="salt", lora_request=lora, sampling_params=params)
    arrival = facts.arrival(request)
    assert arrival.blocks == (b"x", b"y")
    assert arrival.namespace == Namespace("t", "salt", "a:2:/l")
    assert (arrival.session_id, arrival.parent_session_id) == ("s", "p")


def test_prompts_that_end_differently_have_different_endings():
    endings = {facts.arrival(FakeRequest("r", prompt_token_ids=[7] * 99 + [end])).ending for end in (1, 2, 2)}
    assert len(endings) == 2
    assert 0 not in endings
    assert facts.arrival(FakeRequest("r", prompt_token_ids=None)).ending == 0, "embeddings have no tokens"


def test_the_arrival_keeps_its_hashes_while_vllm_appends():
    request = FakeRequest("r", [b"x"])
    arrival = facts.arrival(request)
    request.block_hashes.append(b"y")
    assert arrival.blocks == (b"x",)


def test_a_caller_that_is_not_ours_is_not_believed():
    request = FakeRequest("r", sampling_params=FakeParams({facts.CALLER_KEY: "tenant=admin"}))
    assert facts.arrival(request).namespace == Namespace()


def test_children_of_one_request_are_one_turn():
    assert {facts.turn_id(FakeRequest(f"{i}_cmpl-7-ab")) for i in range(12)} == {"cmpl-7-ab"}
    assert facts.turn_id(FakeRequest("7-ab")) == "7-ab"


def test_a_long_session_id_becomes_a_digest():
    long = facts.bounded_id("x" * 5000)
    assert long is not None
    assert len(long) == 64
    assert facts.bounded_id("") is None
    assert facts.bounded_id(7) is None


@pytest.mark.parametrize(
    ("reason", "output", "stop", "outcome"),
    [
        ("stop", [1, 2], [], Outcome.STOP),
        ("stop", [1, 9, 2], [], Outcome.TOOL_CALL),
        ("length", [9], [], Outcome.LENGTH),
        ("abort", [], [], Outcome.ABORT),
        ("abort", [], ["END"], Outcome.UNKNOWN),
        ("error", [], [], Outcome.ERROR),
        ("novel", [], [], Outcome.UNKNOWN),
    ],
)
def test_how_a_turn_ended(reason, output, stop, outcome):
    request = FakeRequest("r", output_token_ids=output, reason=reason, sampling_params=FakeParams(stop=stop))
    assert facts.finish(request, frozenset({9})).outcome is outcome

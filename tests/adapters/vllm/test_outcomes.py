"""Outcomes that callers post, on their way to the ledger."""

import json

import pytest

pytest.importorskip("prometheus_client")

from tests.adapters.vllm.asgi import JSON, Site

LEDGER = {"ledger.path": ("test", "/tmp/l.jsonl")}


async def post_outcome(site, body, headers=None):
    status, _, answer = await site.request("POST", "/impala/outcome", headers or JSON, [json.dumps(body).encode()])
    return status, json.loads(answer)


async def test_an_outcome_goes_to_every_engine_with_the_callers_tenant():
    site = Site(flags=LEDGER)
    site.core.outcomes = [0, 2]
    headers = {"Authorization": "Bearer one"}
    body = {"outcome": "success", "session_id": "s", "score": 0.75}
    assert await post_outcome(site, body, headers) == (200, {"traces": 2})
    (asked,) = site.core.pages
    assert {**asked, "tenant": "x"} == {"outcome": "success", "score": 0.75, "session_id": "s", "tenant": "x"}
    assert len(asked["tenant"]) == 16
    assert site.body is None, "vLLM must not see it"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"outcome": "success"}, "names 0 of"),
        ({"outcome": "success", "session_id": "a", "trace_id": "t1"}, "names 2 of"),
        ({"outcome": "It went well!", "session_id": "a"}, "outcome"),
        ({"session_id": "a"}, "outcome"),
        ({"outcome": "success", "session_id": "a", "prompt": "x"}, "prompt"),
        ([], "object"),
        ({"outcome": "success", "session_id": "x" * 9000}, "body"),
    ],
)
async def test_an_outcome_that_makes_no_sense_is_answered_in_one_line(body, says):
    site = Site(flags=LEDGER)
    status, answer = await post_outcome(site, body)
    assert status == 400
    assert says in answer["error"]
    assert not site.core.pages


async def test_an_outcome_of_an_unknown_trace_and_one_without_a_ledger_are_told_apart():
    site = Site(flags=LEDGER)
    site.core.outcomes = [0]
    body = {"outcome": "failure", "request_id": "cmpl-1"}
    assert (await post_outcome(site, body))[0] == 404
    assert (await post_outcome(Site(), body))[0] == 409
    slow = Site(flags={**LEDGER, "health.answer_within_s": ("test", 0.01)})
    slow.core.answers = False
    assert (await post_outcome(slow, body))[0] == 503


async def test_outcomes_are_posted_with_a_key_and_never_fetched():
    site = Site(api_keys=["k"], flags=LEDGER)
    body = {"outcome": "success", "session_id": "s"}
    assert (await post_outcome(site, body))[0] == 401
    assert (await post_outcome(site, body, {"Authorization": "Bearer k"}))[0] == 200
    assert (await site.request("GET", "/impala/outcome", {"Authorization": "Bearer k"}))[0] == 405

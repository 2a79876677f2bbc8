"""Known nonces held fast, and what is no nonce left alone."""

import pytest

from impala_vllm.insight.audit import Cause, normalise
from tests.insight.audit.logs import SYSTEM, findings, only, report_of, session


def chat(head: str, *texts: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": f"{head}\n{SYSTEM}"}, *({"role": "user", "content": t} for t in texts)]


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("It is 2026-11-24 10:00:00.", "It is 2026-11-24 10:01:30."),
        ("Today is Tuesday, 24 November 2026.", "Today is Wednesday, 25 November 2026."),
        ("session 5e0c1f7e-3c1b-4a53-9d53-2f3b8f0f6a11", "session 0b7c4e88-91d2-4d70-8a10-7c1fd2f0b9aa"),
        ("trace=00f1a2b3c4d5e6f7", "trace=10f1a2b3c4d5e6aa"),
    ],
)
def test_a_clock_and_a_drawn_id_keep_their_first_value(was, now):
    before, after = chat(was, "one"), chat(now, "one", "two")
    assert normalise.messages(before, after) == [before[0], *after[1:]]
    assert after == chat(now, "one", "two")


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("Step 3 of 40.", "Step 4 of 40."),
        ("The order is A1234567.", "The order is B7654321."),
        ("It is 10:00. Be brief.", "It is 10:01. Be thorough."),
        ("It is 10:00.", "Answer in French."),
    ],
)
def test_what_the_model_may_go_by_is_left_alone(was, now):
    after = chat(now, "one")
    assert normalise.messages(chat(was, "one"), after) == after


def test_only_the_system_prompt_is_held():
    before, after = chat("", "It is 10:00, and late."), chat("", "It is 10:05, and late.")
    assert normalise.messages(before, after) == after
    assert normalise.messages([], after) == after


def test_an_audit_says_what_is_left_when_nonces_are_held(tmp_path):
    requests = session(5)
    for turn, request in enumerate(requests):
        request["messages"][0]["content"] = f"It is 2026-11-24 10:0{turn}:00.\n{SYSTEM}"
    requests[4]["messages"][1]["content"] += "  "
    assert set(report_of(tmp_path, requests).totals) == {Cause.TIMESTAMP}
    assert only(findings(tmp_path, requests, normalised=True)) == ("message 2", Cause.WHITESPACE)
    assert report_of(tmp_path, requests, normalised=True).normalised == 4

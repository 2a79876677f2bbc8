"""Sessions in a log that does not name them."""

import json
from random import Random
from typing import Any

from impala_vllm.insight.audit import Cause
from tests.insight.audit.logs import SYSTEM, findings, only, report_of, session


def sessions(number: int, num_turns: int = 4) -> list[list[dict[str, Any]]]:
    """Sessions of one program with tasks and answers of their own, without ids."""
    found: list[list[dict[str, Any]]] = []
    for i in range(number):
        text = json.dumps(session(num_turns))
        for word in ("ticket", "paris", "seat", "window", "late", "refund"):
            text = text.replace(word, f"{word}{'abcdefgh'[i]}")
        requests = json.loads(text)
        for request in requests:
            request["request_id"] = f"{i} {request['request_id']}"
            del request["session_id"]
        found.append(requests)
    return found


def mingled(parts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    random, waiting = Random(3), [iter(part) for part in parts]
    found: list[dict[str, Any]] = []
    while waiting:
        one = random.choice(waiting)
        request = next(one, None)
        if request is None:
            waiting.remove(one)
        else:
            found.append(request)
    return found


def test_sessions_that_come_in_turns_are_told_apart(tmp_path):
    report = report_of(tmp_path, mingled(sessions(6)))
    assert (report.sessions, report.resumed, report.totals) == (6, 18, {})


def test_a_clock_at_the_head_of_every_prompt_does_not_hide_whose_turn_it_is(tmp_path):
    requests = mingled(sessions(4))
    for second, request in enumerate(requests):
        request["messages"][0]["content"] = f"It is 2026-11-24 10:00:{second:02d}.\n{SYSTEM}"
    report = report_of(tmp_path, requests)
    assert report.sessions == 4
    assert {cause: total.turns for cause, total in report.totals.items()} == {Cause.TIMESTAMP: 12}


def test_two_samples_of_one_task_are_two_sessions_and_no_edit(tmp_path):
    one, other = sessions(2)
    for a, b in zip(one, other, strict=True):
        b["messages"][:2] = a["messages"][:2]
    report = report_of(tmp_path, [request for pair in zip(one, other, strict=True) for request in pair])
    assert report.totals == {}


def test_a_history_trimmed_before_an_answer_is_found(tmp_path):
    (requests,) = sessions(1, num_turns=6)
    del requests[5]["messages"][1]
    assert only(findings(tmp_path, requests)) == ("message 2", Cause.TRIMMED)


def test_tenants_never_share_a_session(tmp_path):
    (requests,) = sessions(1)
    for i, request in enumerate(requests):
        request["tenant"] = "ab"[i % 2]
    assert report_of(tmp_path, requests).sessions == 2


def test_one_task_on_two_models_is_two_sessions_and_a_session_that_changes_its_model_is_one(tmp_path):
    one, other = sessions(2)
    for a, b in zip(one, other, strict=True):
        b["messages"][:2] = a["messages"][:2]
        a["model"], b["model"] = "small", "large"
    assert report_of(tmp_path, [*one, *other]).totals == {}
    for request in one[2:]:
        request["model"] = "large"
    assert only(findings(tmp_path, one)) == ("whole prompt", Cause.MODEL)

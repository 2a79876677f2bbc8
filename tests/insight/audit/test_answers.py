"""An answer as it was given, against the same answer in the next prompt."""

from itertools import pairwise
from typing import Any

import pytest

from impala_vllm.insight.audit import Cause
from tests.insight.audit.logs import report_of, session


def answered(num_turns: int = 3) -> list[dict[str, Any]]:
    """Requests with the outputs that their histories hold."""
    requests = session(num_turns + 1)
    for request, after in pairwise(requests):
        request["output"] = after["messages"][len(request["messages"])]
    return requests[:num_turns]


def test_answers_that_come_back_as_they_were_are_counted_and_no_more(tmp_path):
    report = report_of(tmp_path, answered())
    assert (report.answered, report.missing_answers, report.answers) == (2, 0, {})


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ({"content": "The flight is booked,  in seat 14C."}, Cause.WHITESPACE),
        (
            {"content": "The flight is booked, in seat 14C.", "reasoning_content": "An aisle seat, then."},
            Cause.RERENDERED,
        ),
        ({"content": "The flight is booked, in seat 14C. Shall I book the return flight as well?"}, Cause.TRIMMED),
    ],
)
def test_an_answer_that_comes_back_changed_is_named(tmp_path, given, cause):
    requests = answered(2)
    requests[0]["output"] = {"role": "assistant", **given}
    requests[1]["messages"][2] = {"role": "assistant", "content": "The flight is booked, in seat 14C."}
    report = report_of(tmp_path, requests)
    assert report.answered == 1
    assert set(report.answers) == {cause}
    assert report.totals == {}


def test_an_answer_that_history_leaves_out_is_missing(tmp_path):
    requests = answered(2)
    del requests[1]["messages"][2]
    report = report_of(tmp_path, requests)
    assert (report.answered, report.missing_answers, report.answers) == (1, 1, {})


def test_ids_that_a_server_gave_its_calls_are_no_difference(tmp_path):
    requests = answered(2)
    call = requests[0]["output"]["tool_calls"][0]
    requests[0]["output"] = {"role": "assistant", "content": None, "tool_calls": [{**call, "id": "chatcmpl-tool-7"}]}
    assert report_of(tmp_path, requests).answers == {}

"""First prompts of sessions against each other."""

import pytest

from impala_vllm.insight.audit import Cause
from tests.insight.audit.logs import SYSTEM, report_of, session


def starts(tmp_path, *systems: str) -> dict[Cause, tuple[int, int]]:
    requests = [{**session(1)[0], "session_id": str(i), "tools": None} for i in range(len(systems))]
    for request, system in zip(requests, systems, strict=True):
        request["messages"] = [{"role": "system", "content": system}, *request["messages"][1:]]
    report = report_of(tmp_path, requests)
    assert report.totals == {}
    return {cause: (total.turns, total.lost_tokens) for cause, total in report.starts.items()}


@pytest.mark.parametrize(
    ("heads", "cause"),
    [
        (("It is 2026-11-24 10:00.", "It is 2026-11-25 11:30."), Cause.TIMESTAMP),
        (("Session 5e0c1f7e-3c1b-4a53.", "Session 0b7c4e88-91d2-4d70."), Cause.NONCE),
        (("The user is called Anna Smith.", "The user is called Bob Jones."), Cause.LEADING),
    ],
)
def test_what_differs_at_the_head_of_one_program_is_named_with_what_lies_behind(tmp_path, heads, cause):
    found = starts(tmp_path, *(f"{head}\n{SYSTEM}" for head in heads))
    assert set(found) == {cause}
    assert found[cause] == (1, pytest.approx(len(SYSTEM) / 4, rel=0.1))


def test_what_differs_at_the_end_costs_nothing(tmp_path):
    assert starts(tmp_path, f"{SYSTEM}\nIt is 2026-11-24 10:00.", f"{SYSTEM}\nIt is 2026-11-25 11:30.") == {}


def test_other_programs_and_the_same_prompt_again_are_no_finding(tmp_path):
    other = "Name this conversation. " + "Five words at most, no quotes, no full stop. " * 12
    assert starts(tmp_path, SYSTEM, SYSTEM, other) == {}

"""The audit of a running server's rows: where a prompt left the one before it, and what the cache had lost."""

from typing import Any

import pytest

from impala_vllm.insight.audit import Cause, Finding, server

BLOCK = 16


def row(**changed: Any) -> dict[str, Any]:
    """A turn of 400 tokens that goes on after one of 320 with an answer of 40, all of it known and found."""
    return {
        "trace_id": "t1",
        "request_id": "r",
        "source": "continuation",
        "matched_blocks": 22,
        "prompt_tokens": 400,
        "cached_tokens": 352,
        "previous_prompt_tokens": 320,
        "previous_tokens": 360,
    } | changed


FIRST = row(source="new", matched_blocks=0, cached_tokens=0, previous_prompt_tokens=0, previous_tokens=0)


def audited(*rows: dict[str, Any]) -> tuple[Any, list[Finding]]:
    found: list[Finding] = []
    return server.audit([(BLOCK, [FIRST, *rows])], found.append), found


def test_turns_that_go_on_and_are_found_are_no_findings():
    report, found = audited(row(), row(source="retry", matched_blocks=25, cached_tokens=384))
    assert not found
    assert not report.answers
    assert (report.requests, report.sessions, report.resumed, report.served) == (3, 1, 1, 3)
    assert (report.prompt_tokens, report.lost_tokens, report.estimated) == (1200, 0, False)


@pytest.mark.parametrize(
    ("changed", "cause", "lost_tokens", "block"),
    [
        ({"matched_blocks": 15, "cached_tokens": 240}, Cause.BLOCKS, 80, 16),
        ({"matched_blocks": 3, "cached_tokens": 48, "source": "compaction"}, Cause.COMPACTED, 272, 4),
        ({"cached_tokens": 0}, Cause.EVICTED, 352, 1),
        ({"cached_tokens": 336}, Cause.LAST_BLOCK, 16, 22),
        ({"prompt_tokens": 12, "matched_blocks": 0, "cached_tokens": 0}, Cause.SHORT, 12, 1),
        ({"source": "rollback", "matched_blocks": 9, "cached_tokens": 0}, Cause.EVICTED, 144, 1),
    ],
)
def test_what_is_computed_again_has_a_cause(changed: dict[str, Any], cause: Cause, lost_tokens: int, block: int):
    report, (finding,) = audited(row(**changed))
    assert (finding.cause, finding.lost_tokens, finding.block) == (cause, lost_tokens, block)
    assert (finding.session, finding.turn) == ("t1", 2)
    assert report.lost_tokens == lost_tokens
    assert [(w.session, w.turns, w.lost_tokens) for w in report.worst_sessions] == [("t1", 2, lost_tokens)]


def test_an_answer_that_comes_back_as_another_one_is_told_apart_from_the_prompt():
    report, found = audited(row(matched_blocks=20, cached_tokens=320))
    assert not found
    assert report.answered == 1
    assert report.answers[Cause.RERENDERED].lost_tokens == 32


def test_a_turn_that_has_not_begun_says_nothing_of_the_cache():
    report, found = audited(row(cached_tokens=None))
    assert not found
    assert report.served == 1


def test_traces_of_different_ranks_are_different_traces():
    found: list[Finding] = []
    report = server.audit([(BLOCK, [FIRST]), (BLOCK, [FIRST, row(cached_tokens=0)])], found.append)
    assert report.sessions == 2
    assert [f.session for f in found] == ["rank 1 t1"]

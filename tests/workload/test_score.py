"""The score on logs small enough to count by hand."""

import pytest

from impala_vllm.core.types import Link, Source, TraceId
from impala_vllm.workload.score import Kind, Score
from impala_vllm.workload.turn import Turn


def turn(name: str, trace: str | None, blocks: tuple[int, ...], parent: str | None = None) -> Turn:
    return Turn(name, 0.0, None, blocks, 16, 16 * len(blocks), None, trace_id=trace, parent_trace_id=parent)


def link(trace: str, source: Source = Source.CONTINUATION, parent: str | None = None) -> Link:
    return Link(TraceId(trace), TraceId(parent) if parent else None, source, 1.0, 0)


def test_perfect_links_score_one() -> None:
    score = Score()
    for name, true in (("1", "a"), ("2", "b"), ("3", "a"), ("4", "b")):
        score.note(turn(name, true, (1,)), link(true))
    assert (score.precision, score.recall, score.link_f1, score.exact_f1) == (1.0, 1.0, 1.0, 1.0)


def test_a_merge_costs_precision_and_a_split_costs_recall() -> None:
    merged = Score()
    for name, true in (("1", "a"), ("2", "b"), ("3", "a"), ("4", "b")):
        merged.note(turn(name, true, (1,)), link("one"))
    assert merged.links.total == 3  # 1-2, 2-3, 3-4: all across traces
    assert merged.links.right == 0
    split = Score()
    for name, predicted in (("1", "x"), ("2", "x"), ("3", "y"), ("4", "y")):
        split.note(turn(name, "a", (1,)), link(predicted))
    assert split.precision == 1.0
    assert split.recall == pytest.approx(2 / 3)
    assert split.link_f1 == pytest.approx(0.8)


def test_requests_without_truth_do_not_count() -> None:
    score = Score()
    score.note(turn("1", None, (1,)), link("x"))
    score.note(turn("2", "a", (1,)), link("x"))
    assert score.links.total == 0
    assert score.true_links == 0


def test_kinds_are_read_from_the_truth_alone() -> None:
    score = Score()
    stem, own = (1, 2), (1, 2, 10, 11, 12)
    turns = [
        turn("other", "b", (*stem, 20)),
        turn("start", "a", own),
        turn("retry", "a", own),
        turn("next", "a", (*own, 13, 14)),
        turn("back", "a", (*own[:4], 30, 31)),
        turn("short", "a", (*stem, 40)),
        turn("child", "c", (50, 51), parent="a"),
    ]
    for t in turns:
        score.note(t, link(t.trace_id or ""))
    kinds = {kind: tally.total for kind, tally in score.by_kind.items()}
    assert kinds == {
        Kind.START: 2,
        Kind.RETRY: 1,
        Kind.CONTINUATION: 1,
        Kind.ROLLBACK: 1,
        Kind.COMPACTION: 1,
        Kind.SUBAGENT_START: 1,
    }


def test_parents_are_right_wrong_missed_or_unasked() -> None:
    score = Score()
    score.note(turn("p", "p", (1,)), link("P", Source.NEW))
    score.note(turn("q", "q", (2,)), link("Q", Source.NEW, parent="P"))
    score.note(turn("c1", "c1", (3,), parent="p"), link("C1", Source.SUBAGENT, parent="P"))
    score.note(turn("c2", "c2", (4,), parent="p"), link("C2", Source.SUBAGENT, parent="Q"))
    score.note(turn("c3", "c3", (5,), parent="p"), link("C3", Source.NEW))
    parents = score.parents
    assert (parents.right, parents.wrong, parents.missed, parents.unasked) == (1, 1, 1, 1)

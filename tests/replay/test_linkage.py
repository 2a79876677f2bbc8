"""The server's answers beside the recorded truth."""

from impala_vllm.replay.linkage import Recognised, join, score
from impala_vllm.replay.load import Run, TurnResult


def turn(session: str, index: int, start: float, parent: str | None = None, error: str | None = None) -> TurnResult:
    name = f"{session}#{index}"
    return TurnResult(session, parent, index, name, f"run0-{start:06.0f}", start, start, start + 0.5, 0, 9, 1, 0, error)


def said(trace: str, parent: str | None = None) -> Recognised:
    return Recognised(trace, parent, "continuation")


def test_all_right_scores_one() -> None:
    run = Run((turn("a", 0, 0), turn("b", 0, 1), turn("a", 1, 2), turn("b", 1, 3)), 4)
    found = score(run, {"a#0": said("x"), "a#1": said("x"), "b#0": said("y"), "b#1": said("y")})
    assert (found.precision, found.recall, found.f1) == (1.0, 1.0, 1.0)
    assert [s.num_right for s in found.sessions] == [2, 2]


def test_two_sessions_taken_for_one_cost_precision_and_recall() -> None:
    run = Run((turn("a", 0, 0), turn("b", 0, 1), turn("a", 1, 2)), 3)
    found = score(run, {"a#0": said("x"), "b#0": said("x"), "a#1": said("x")})
    assert (found.precision, found.recall) == (0.0, 0.0)


def test_one_session_taken_for_two_costs_recall_only() -> None:
    run = Run(tuple(turn("a", i, i) for i in range(3)), 3)
    found = score(run, {"a#0": said("x"), "a#1": said("x"), "a#2": said("y")})
    assert (found.precision, found.recall) == (1.0, 0.5)
    assert found.sessions[0].num_traces == 2


def test_requests_without_an_answer_are_missed_links() -> None:
    run = Run((turn("a", 0, 0), turn("a", 1, 1)), 2)
    found = score(run, {})
    assert (found.num_unanswered, found.recall, found.f1) == (2, 0.0, 0.0)


def test_failed_requests_do_not_count() -> None:
    run = Run((turn("a", 0, 0), turn("a", 1, 1, error="HTTP 500"), turn("a", 2, 2)), 3)
    assert score(run, {"a#0": said("x"), "a#2": said("x")}).f1 == 1.0


def test_parents_are_right_wrong_or_invented() -> None:
    run = Run((turn("p", 0, 0), turn("c", 0, 1, parent="p"), turn("q", 0, 2)), 3)
    found = score(run, {"p#0": said("x"), "c#0": said("y", parent="x"), "q#0": said("z", parent="x")})
    assert [s.parent_right for s in found.sessions] == [None, True, False]


def test_the_engines_request_id_leads_back_to_ours() -> None:
    run = Run((turn("a", 0, 7),), 8)
    rest = {"parent_trace_id": None, "source": "new"}
    links = [
        {"request_id": "cmpl-run0-000007-0", "trace_id": "x", **rest},
        {"request_id": "cmpl-run9-000007-0", "trace_id": "z", **rest},
    ]
    assert join(run, links) == {"a#0": Recognised("x", None, "new")}

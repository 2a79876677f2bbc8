"""Did the server recognise whose turn each request was? Its own answers joined with the recorded truth.

The server names a trace for every request; the recording does too. A *link* is a request and the one
before it in the same trace, in order of arrival; F1 compares the two sets of links.
"""

import json
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from impala_vllm.replay.load import Run, TurnResult


@dataclass(frozen=True, slots=True)
class Recognised:
    """The server's view of one request."""

    trace_id: str
    parent_trace_id: str | None
    source: str


@dataclass(frozen=True, slots=True)
class SessionScore:
    """One recorded session beside the trace the server mostly took it for."""

    session_id: str
    trace_id: str | None
    """The trace of most of its turns."""
    num_turns: int
    num_right: int
    """Turns whose link is right: the same predecessor, or rightly none."""
    num_traces: int
    """Traces its turns were spread over; 1 is right."""
    parent_id: str | None
    parent_right: bool | None
    """Whether its parent was recognised; None: it has none and none was claimed."""


@dataclass(frozen=True, slots=True)
class LinkScore:
    """Scores of a run. Precision and recall are over links, not turns."""

    num_requests: int
    num_unanswered: int
    """Requests that the server said nothing about; their links count as missed."""
    precision: float
    recall: float
    f1: float
    sessions: tuple[SessionScore, ...]


def fetch(url: str, of: str, timeout_s: float = 30.0) -> list[dict[str, Any]]:
    """All rows of /impala/links or /impala/traces of a live server. Raises OSError where it does not answer."""
    rows: list[dict[str, Any]] = []
    after: str | None = None
    while True:
        query = "limit=1000" + ("" if after is None else f"&after={after}")
        with urllib.request.urlopen(f"{url}/impala/{of}?{query}", timeout=timeout_s) as response:
            rank = cast("dict[str, Any]", json.load(response))["ranks"][0]
        rows += rank["rows"]
        after = rank["next"]
        if after is None:
            return rows


def join(run: Run, links: Iterable[Mapping[str, Any]]) -> dict[str, Recognised]:
    """Recorded request id -> what the server said. The engine wraps the id we sent into one of its own."""
    by_sent = {r.sent_id: r.recorded_id for r in run.results}
    found: dict[str, Recognised] = {}
    for link in links:
        sent = _sent_id(str(link["request_id"]), by_sent)
        if sent is not None:
            found[by_sent[sent]] = Recognised(
                str(link["trace_id"]), cast("str | None", link["parent_trace_id"]), str(link["source"])
            )
    return found


def score(run: Run, recognised: Mapping[str, Recognised]) -> LinkScore:
    """Compare the server's links with the recorded ones. Failed requests are left out of both."""
    results = sorted((r for r in run.results if r.error is None), key=lambda r: r.start_s)
    truth = _links(results, {r.recorded_id: r.session_id for r in results})
    claimed = _links(results, {k: v.trace_id for k, v in recognised.items()})
    right = sum(truth[k] is not None and claimed.get(k) == truth[k] for k in truth)
    num_true = sum(v is not None for v in truth.values())
    num_claimed = sum(v is not None for v in claimed.values())
    precision = right / num_claimed if num_claimed else 1.0
    recall = right / num_true if num_true else 1.0
    both = precision + recall
    return LinkScore(
        num_requests=len(results),
        num_unanswered=sum(r.recorded_id not in recognised for r in results),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / both if both else 0.0,
        sessions=_sessions(results, recognised, truth, claimed),
    )


def _sent_id(request_id: str, known: Mapping[str, str]) -> str | None:
    """`cmpl-<ours>-0` and whatever the engine adds behind it."""
    parts = request_id.split("-")
    for i in range(len(parts) - 1):
        if (name := f"{parts[i]}-{parts[i + 1]}") in known:
            return name
    return None


def _links(results: Sequence[TurnResult], owner: Mapping[str, str]) -> dict[str, str | None]:
    """Request -> the request before it of the same owner; unowned requests are missing."""
    last: dict[str, str] = {}
    links: dict[str, str | None] = {}
    for r in results:
        if (name := owner.get(r.recorded_id)) is not None:
            links[r.recorded_id] = last.get(name)
            last[name] = r.recorded_id
    return links


def _sessions(
    results: Sequence[TurnResult],
    recognised: Mapping[str, Recognised],
    truth: Mapping[str, str | None],
    claimed: Mapping[str, str | None],
) -> tuple[SessionScore, ...]:
    turns: dict[str, list[TurnResult]] = {}
    for r in results:
        turns.setdefault(r.session_id, []).append(r)
    main = {name: _most([recognised[r.recorded_id].trace_id for r in rs if r.recorded_id in recognised])
            for name, rs in turns.items()}  # fmt: skip
    scores: list[SessionScore] = []
    for name, rs in turns.items():
        said = [recognised[r.recorded_id] for r in rs if r.recorded_id in recognised]
        parent = rs[0].parent_id
        parent_claim = said[0].parent_trace_id if said else None
        scores.append(
            SessionScore(
                session_id=name,
                trace_id=main[name],
                num_turns=len(rs),
                num_right=sum(r.recorded_id in claimed and claimed[r.recorded_id] == truth[r.recorded_id] for r in rs),
                num_traces=len({s.trace_id for s in said}),
                parent_id=parent,
                parent_right=(
                    None
                    if parent is None and parent_claim is None
                    else parent is not None and parent_claim is not None and parent_claim == main.get(parent)
                ),
            )
        )
    return tuple(scores)


def _most(names: Sequence[str]) -> str | None:
    return max(names, key=names.count) if names else None

"""Reads a log once and says of each turn whether it begins with the prompt before it, and if not, why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from impala_vllm.core.identity import Identity, IdentityConfig
from impala_vllm.core.types import Arrival, Finish, Namespace, RequestId
from impala_vllm.insight.audit import blocks
from impala_vllm.insight.audit.compare import Divergence, Prompt, compare, num_bytes
from impala_vllm.insight.audit.prints import Print
from impala_vllm.insight.audit.prompts import Prompts
from impala_vllm.insight.audit.report import Finding, Report, tokens
from impala_vllm.insight.audit.requests import Kind, Request, kinds, read
from impala_vllm.insight.audit.schemas import Schemas
from impala_vllm.insight.audit.sessions import Sessions
from impala_vllm.workload import Format, WorkloadError
from impala_vllm.workload.source import BAD_JSON
from impala_vllm.workload.text_blocks import BLOCK_TOKENS, block_ids, num_tokens, render

_FRAGMENT = 60
"""Characters shown of each side of a difference."""

OnFinding = Callable[[Finding], None]


def audit(
    path: Path,
    form: Format = Format.AUTO,
    *,
    show_text: bool = False,
    on_request: Callable[[], None] = lambda: None,
    on_finding: OnFinding | None = None,
) -> Report:
    """The report on a log or a directory of logs. Raises WorkloadError where nothing in it is usable.

    Memory is bounded: fingerprints of a few prompts for each of the sessions last seen. Texts are kept
    only with `show_text`, and then only the start of each segment. `on_finding` gets every finding.
    """
    report = Report(estimated=True)
    found = kinds(path, report.skip)
    texts = [(file, kind) for file, kind in found if kind.is_text]
    if form is Format.MESSAGES and not texts:
        raise WorkloadError(f"{path}: not a messages log; leave out --format messages")
    if form is Format.AZURE or (form not in (Format.AUTO, Format.MESSAGES) and texts):
        raise WorkloadError(f"{path}: not a log in format {form.value}; leave out --format")
    note = _noting(report, on_finding)
    if texts:
        for file, kind in found:
            if not kind.is_text:
                report.skip(WorkloadError(f"{file}: block ids beside messages; audit them apart"))
        _Texts(report, show_text, note, on_request).run(texts)
    elif found:
        report.estimated = False
        blocks.audit(path, found[0][1], report, note, on_request)
    if not report.requests:
        raise WorkloadError(report.first_error or f"{path}: no request in it; give a log with at least one")
    return report


def _noting(report: Report, on_finding: OnFinding | None) -> OnFinding:
    def note(finding: Finding) -> None:
        report.note(finding)
        if on_finding is not None:
            on_finding(finding)

    return note


class _Texts:
    """One pass over logs of messages."""

    def __init__(self, report: Report, show_text: bool, note: OnFinding, on_request: Callable[[], None]) -> None:
        self._report = report
        self._note = note
        self._on_request = on_request
        self._schemas = Schemas()
        self._prompts = Prompts(self._schemas, show_text)
        self._sessions = Sessions()
        self._identity = Identity(IdentityConfig())
        self._clock = 0.0

    def run(self, files: list[tuple[Path, Kind]]) -> None:
        for file, kind in files:
            for request in read(file, kind, self._report.skip):
                try:
                    self._request(request)
                except BAD_JSON as e:
                    self._report.skip(WorkloadError(f"{request.request_id}: not a chat request ({e}); mend that line"))
                self._on_request()
        self._report.sessions = self._sessions.num_seen
        self._report.sessions_forgotten = self._sessions.num_forgotten
        self._report.tools = self._schemas.tools()

    def _request(self, request: Request) -> None:
        name = f"{request.tenant}\0{self._recognised(request) if request.session is None else request.session}"
        session = self._sessions.get(name)
        now, raws = self._prompts.of(request, session)
        self._report.requests += 1
        self._report.prompt_tokens += tokens(num_bytes(now.segments))
        before = session.before(now)
        if before is not None:
            self._report.resumed += 1
            found = compare(before.prompt, now)
            lost = found.lost_bytes - (before.cached_bytes if found.segment is None else 0) if found else 0
            if found is not None and lost > 0:
                self._note(self._finding(request, name, session.num_turns + 1, before.prompt, now, found, lost))
        session.add(now, raws)
        self._sessions.settle(name)

    def _finding(
        self, request: Request, name: str, turn: int, before: Prompt, now: Prompt, found: Divergence, lost: int
    ) -> Finding:
        was = shown = None
        if found.segment is not None:
            was, shown = _fragments(before.segments[found.segment], now.segments[found.segment])
        session = name.partition("\0")[2]
        return Finding(
            session, request.request_id, turn, _label(now, found.segment), found.cause, tokens(lost), was, shown
        )

    def _recognised(self, request: Request) -> str:
        """The trace a request belongs to, by what `impala identify` uses."""
        messages: list[dict[str, Any]] = [msgspec.json.decode(m, type=dict[str, Any]) for m in request.messages]
        tools = msgspec.json.decode(request.tools) if request.tools is not None else None
        text = render(messages, tools)
        ids = block_ids(text, BLOCK_TOKENS)
        length = num_tokens(text)
        self._clock = max(self._clock, request.arrival_s)  # a clock that runs backwards is no clock
        rid = RequestId(f"{self._report.requests}")
        link = self._identity.arrive(
            Arrival(rid, ids, length, Namespace(tenant=request.tenant, model=request.model)), self._clock
        )
        self._identity.finish(Finish(rid, ids, length), self._clock)
        return link.trace_id


def _label(prompt: Prompt, segment: int | None) -> str:
    """`tools`, `system`, `message n` or `paragraph n`; messages are counted from 1, tools left out."""
    if segment is None:
        return "whole prompt"
    role = prompt.segments[segment].role
    if role in ("tools", "system", "developer"):
        return "tools" if role == "tools" else "system"
    number = segment + 1 - sum(s.role == "tools" for s in prompt.segments[:segment])
    return f"paragraph {number}" if role == "paragraph" else f"message {number}"


def _fragments(was: Print, now: Print) -> tuple[str | None, str | None]:
    if was.text is None or now.text is None:
        return None, None
    at = next((i for i, (a, b) in enumerate(zip(was.text, now.text, strict=False)) if a != b), None)
    start = max((min(len(was.text), len(now.text)) if at is None else at) - _FRAGMENT // 3, 0)
    return was.text[start : start + _FRAGMENT], now.text[start : start + _FRAGMENT]

"""One pass over logs of messages: each turn against the prompt before it, its cache count and its answer."""

from collections.abc import Callable
from pathlib import Path

from impala_vllm.insight.audit import answers, bloat, normalise, served
from impala_vllm.insight.audit.causes import Cause
from impala_vllm.insight.audit.compare import Divergence, Prompt, compare, num_bytes, shared
from impala_vllm.insight.audit.kinds import Kind
from impala_vllm.insight.audit.naming import fragments, label, shown_name
from impala_vllm.insight.audit.prompts import Prompts
from impala_vllm.insight.audit.report import Finding, Report, Worst, tokens
from impala_vllm.insight.audit.requests import Request, read
from impala_vllm.insight.audit.schemas import Schemas
from impala_vllm.insight.audit.segment import Segment
from impala_vllm.insight.audit.sessions import Before, Session, Sessions
from impala_vllm.insight.audit.starts import Starts
from impala_vllm.insight.audit.threads import Threads
from impala_vllm.workload.source import BAD_JSON, WorkloadError

_SAMPLED = (Cause.EDITED, Cause.TRIMMED, Cause.COUNTER, Cause.NONCE, Cause.TIMESTAMP, Cause.HEAD)
"""What two answers to one prompt may look like."""


class Texts:
    """Fills a report. Memory: what `Sessions` keeps."""

    def __init__(
        self,
        report: Report,
        note: Callable[[Finding], None],
        on_request: Callable[[], None],
        *,
        block_tokens: int,
        show_text: bool,
        normalised: bool,
    ) -> None:
        self._report = report
        self._note = note
        self._on_request = on_request
        self._block_tokens = block_tokens
        self._show_text = show_text
        self._normalise = normalised
        self._schemas = Schemas()
        self._prompts = Prompts(self._schemas)
        self._sessions = Sessions(self._end)
        self._threads = Threads(self._sessions)
        self._starts = Starts()
        self._scale = 1.0
        """True tokens of the request over the estimate; 1 where the log does not count them."""

    def run(self, files: list[tuple[Path, Kind]]) -> None:
        """Read them all."""
        for file, kind in files:
            try:
                for request in read(file, kind, self._report.skip):
                    self._try(request)
            except WorkloadError as e:  # the rest of that file is damaged: what came before stands
                self._report.skip(e)
        self._sessions.close()
        report = self._report
        report.sessions, report.sessions_forgotten = self._sessions.num_seen, self._sessions.num_forgotten
        report.tools = self._schemas.tools()
        report.estimated = report.counted < report.requests

    def _try(self, request: Request) -> None:
        try:
            self._request(request)
        except BAD_JSON as e:
            self._report.skip(WorkloadError(f"{request.request_id}: not a chat request ({e}); mend that line"))
        self._on_request()

    def _request(self, request: Request) -> None:
        session, now, raws = self._place(request)
        report = self._report
        size = now.num_bytes
        self._scale = 1.0
        if request.prompt_tokens is not None and size:
            self._scale = request.prompt_tokens / tokens(size)
            report.counted += 1
        report.requests += 1
        report.prompt_tokens += self._tokens(size)
        fresh = [s for h, s in raws.items() if h not in session.known]
        report.carried.note(request, now.segments, fresh)
        before = session.before(now)
        held = normalise.prompt(before.prompt, now) if self._normalise and before is not None else None
        if held is not None:
            report.normalised += 1
            now, before = held, session.before(held)
        if before is not None:
            report.resumed += 1
            self._turn(request, session, before, now, size)
        elif not session.num_turns:
            self._start(request, session, now)
        now.answer = answers.recorded(request.output)
        session.add(now, raws)
        session.repeated_bytes = bloat.repeated(now.segments)
        if request.session is None:
            self._threads.note(request, session, now)
        self._sessions.settle(session.name)

    def _place(self, request: Request) -> tuple[Session, Prompt, dict[int, Segment]]:
        """The session of a request, and its prompt."""
        session = None
        if request.session is not None:
            session = self._sessions.get(f"{request.tenant}\0{request.session}")
        else:
            session = self._threads.by_bytes(request)
        if session is not None:
            return session, *self._prompts.of(request, session.known, session.heads())
        now, raws = self._prompts.of(request, {}, ())
        session = self._threads.by_letters(request, now.segments)
        return session or self._sessions.get(self._threads.new()), now, raws

    def _turn(self, request: Request, session: Session, before: Before, now: Prompt, size: int) -> None:
        """What is to be said of a turn that follows another one."""
        report = self._report
        prompt = before.prompt
        found = compare(prompt, now)
        if found is None and before.other is not None:
            prompt = before.other
            found = compare(prompt, now)
        if found is not None and request.session is None and _is_sampled(prompt, now, found):
            found = None
        prompt.is_changed |= found is not None and found.cause is not Cause.HEAD
        if request.cached_tokens is not None:
            report.served += 1
            could = min(self._tokens(before.cached_bytes), self._tokens(size) - 1)
            missing = served.estimated(could, request.cached_tokens, self._block_tokens)
            if missing is not None:
                self._add(request, session, "whole prompt", *missing, request.cached_tokens)
                return
        if found is not None:
            ahead = num_bytes(now.segments[: found.segment]) if found.segment is not None else 0
            lost = found.lost_bytes - max(before.cached_bytes - ahead, 0)
            if lost > 0 or found.cause is Cause.COMPACTED:
                sides = None
                if found.segment is not None:
                    sides = prompt.segments[found.segment], now.segments[found.segment]
                at, lost_tokens = self._tokens(found.shared_bytes), self._tokens(max(lost, 0))
                self._add(request, session, label(now, found.segment), found.cause, lost_tokens, at, sides)
        elif before.cached_bytes and self._tokens(size) < self._block_tokens:
            self._add(request, session, "whole prompt", Cause.SHORT, self._tokens(before.cached_bytes), 0)
        self._answer(request, session, before.prompt, now)

    def _answer(self, request: Request, session: Session, before: Prompt, now: Prompt) -> None:
        """Whether the answer before stands in the prompt as it was given."""
        at = len(before.segments)
        if before.answer is None or shared(before, now) < at or not answers.is_due(before, now):
            return
        self._report.answered += 1
        if not answers.is_there(before, now):
            self._report.missing_answers += 1
            return
        if now.tail_chars is not None:
            return
        found = answers.difference(before.answer, now.segments[at])
        if found is not None:
            ahead = self._tokens(num_bytes(before.segments))
            cause, lost = found[0], self._tokens(found[1])
            self._report.note_answer(self._finding(request, session, label(now, at), cause, lost, ahead))

    def _start(self, request: Request, session: Session, now: Prompt) -> None:
        """A first prompt, against those of other sessions."""
        found = self._starts.first(request.tenant, now)
        if found is None:
            return
        where, ahead = label(now, found.segment), self._tokens(num_bytes(now.segments[: found.segment]))
        lost, sides = self._tokens(found.lost_bytes), (found.was, found.now)
        self._report.note_start(self._finding(request, session, where, found.cause, lost, ahead, sides))

    def _add(
        self,
        request: Request,
        session: Session,
        where: str,
        cause: Cause,
        lost: int,
        at: int,
        sides: tuple[Segment, Segment] | None = None,
    ) -> None:
        session.lost_tokens += lost
        session.num_findings += 1
        self._note(self._finding(request, session, where, cause, lost, at, sides))

    def _finding(
        self,
        request: Request,
        session: Session,
        where: str,
        cause: Cause,
        lost: int,
        at: int,
        sides: tuple[Segment, Segment] | None = None,
    ) -> Finding:
        """Of `lost` tokens behind `at` tokens. Text of the two sides is taken only where that is asked for."""
        was, now = fragments(*sides) if sides is not None and self._show_text else (None, None)
        block = at // self._block_tokens + 1
        turn = session.num_turns + 1
        return Finding(shown_name(session), request.request_id, turn, where, cause, lost, block, was, now)

    def _end(self, session: Session) -> None:
        self._threads.forget(session)
        self._report.carried.repeats(session.repeated_bytes)
        self._report.end(Worst(shown_name(session), session.num_turns, session.num_findings, session.lost_tokens))

    def _tokens(self, num: int) -> int:
        return round(tokens(num) * self._scale)


def _is_sampled(before: Prompt, now: Prompt, found: Divergence) -> bool:
    """Whether these may be two answers to one prompt: where sessions are guessed, that is two sessions."""
    at = found.segment
    if at is None or found.cause not in _SAMPLED or now.segments[at].role != "assistant":
        return False
    answers_before = {s.exact for s in before.segments[at:] if s.role == "assistant"}
    return not any(s.exact in answers_before for s in now.segments[at:])

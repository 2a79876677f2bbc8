"""Logs of block ids: where a turn leaves the one before it, how much lies behind, and what the server had lost."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import msgspec

from impala_vllm.core.identity import Identity, IdentityConfig
from impala_vllm.insight.audit import served
from impala_vllm.insight.audit.causes import Cause
from impala_vllm.insight.audit.kinds import Kind
from impala_vllm.insight.audit.report import Finding, Report, Worst
from impala_vllm.workload import Turn, links, mooncake, requests, weka
from impala_vllm.workload.source import BAD_JSON, WorkloadError, lines

MAX_SESSIONS = 4096
MAX_HEADS = 8
"""Prompts kept a session: sub-agents come between turns."""


class _Served(msgspec.Struct):
    request_id: str
    cached_tokens: int


@dataclass(slots=True)
class _Session:
    num_turns: int = 0
    num_findings: int = 0
    lost_tokens: int = 0
    heads: list[tuple[int, ...]] = field(default_factory=list)


def audit(
    files: list[tuple[Path, Kind]],
    report: Report,
    note: Callable[[Finding], None],
    on_request: Callable[[], None],
) -> None:
    """Fill the report. Memory: a recorded session, the last prompts of the sessions last seen, a count a request.

    A log that names its traces is taken at its word; else they are recognised, in the order of the log.
    """
    sessions: OrderedDict[str, _Session] = OrderedDict()

    def forget() -> None:
        name, old = sessions.popitem(last=False)
        report.end(Worst(name, old.num_turns, old.num_findings, old.lost_tokens))

    for file, kind in files:
        try:
            cached = _served(file, kind)
            for turn, name in _named(_turns(file, kind, report), f"{file.name} " if len(files) > 1 else ""):
                report.requests += 1
                report.prompt_tokens += turn.input_tokens
                report.sessions += name not in sessions
                session = sessions.setdefault(name, _Session())
                sessions.move_to_end(name)
                session.num_turns += 1
                finding = _turn(turn, name, session, cached.get(turn.request_id), report)
                if finding is not None:
                    session.num_findings += 1
                    session.lost_tokens += finding.lost_tokens
                    note(finding)
                kept = [head for head in session.heads if turn.blocks[: len(head)] != head]
                session.heads = [*kept, turn.blocks][-MAX_HEADS:]
                if len(sessions) > MAX_SESSIONS:
                    forget()
                    report.sessions_forgotten += 1
                on_request()
        except WorkloadError as e:  # ids that are no chain, or a damaged file: what came before stands
            report.skip(e)
    while sessions:
        forget()


def _turn(turn: Turn, name: str, session: _Session, cached_tokens: int | None, report: Report) -> Finding | None:
    shared = max((_shared(head, turn.blocks) for head in session.heads), default=0)
    if not shared:
        return None
    report.resumed += 1
    size = turn.block_size
    if cached_tokens is not None:
        report.served += 1
        missing = served.exact(shared * size, turn.input_tokens, cached_tokens, size)
        if missing is not None:
            block = cached_tokens // size + 1
            return Finding(name, turn.request_id, session.num_turns, f"block {block}", *missing, block)
    longest = max(len(head) for head in session.heads if _shared(head, turn.blocks) == shared)
    behind = min(longest, len(turn.blocks)) - shared
    if not behind:
        return None
    block = shared + 1
    return Finding(name, turn.request_id, session.num_turns, f"block {block}", Cause.BLOCKS, behind * size, block)


def _named(turns: Iterator[Turn], prefix: str) -> Iterator[tuple[Turn, str]]:
    """Turns and the names of their sessions, with a prefix where those are our own."""
    first = next(turns, None)
    if first is None:
        return
    everything = chain([first], turns)
    if first.session_id or first.trace_id:
        for turn in everything:
            yield turn, turn.session_id or turn.trace_id or turn.request_id
    else:
        for turn, link in links(everything, Identity(IdentityConfig())):
            yield turn, turn.session_id or f"{prefix}{link.trace_id}"


def _turns(file: Path, kind: Kind, report: Report) -> Iterator[Turn]:
    if kind is Kind.WEKA:
        return weka.read([file], report.skip)
    if kind is Kind.MOONCAKE:
        return mooncake.read(file, report.skip)
    return requests.read(file, report.skip)


def _served(file: Path, kind: Kind) -> dict[str, int]:
    """Tokens that were cached, by request, where a log says so: a `Turn` does not carry it, it is no load."""
    found: dict[str, int] = {}
    if kind is Kind.REQUESTS:
        decoder = msgspec.json.Decoder(_Served)
        with suppress(WorkloadError):  # said when the turns are read
            for line in lines(file):
                with suppress(*BAD_JSON):
                    record = decoder.decode(line.data)
                    found.setdefault(record.request_id, max(record.cached_tokens, 0))
    return found


def _shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Leading blocks that both have. Ids are chained, so equal at one depth means equal up to there."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high) // 2
        if a[middle] == b[middle]:
            low = middle + 1
        else:
            high = middle
    return low

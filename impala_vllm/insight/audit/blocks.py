"""Logs of block ids: where a turn leaves the one before it, how much lies behind, and what the server had lost."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import msgspec

from impala_vllm.core.identity import Identity, IdentityConfig
from impala_vllm.insight.audit import served
from impala_vllm.insight.audit.causes import Cause
from impala_vllm.insight.audit.kinds import Kind
from impala_vllm.insight.audit.report import Finding, Report
from impala_vllm.workload import Turn, links, mooncake, requests, weka
from impala_vllm.workload.source import BAD_JSON, WorkloadError, lines

MAX_SESSIONS = 4096
MAX_HEADS = 8
"""Prompts kept a session: sub-agents come between turns."""


class _Served(msgspec.Struct):
    request_id: str = ""
    cached_tokens: int | None = None


def audit(
    files: list[tuple[Path, Kind]],
    report: Report,
    note: Callable[[Finding], None],
    on_request: Callable[[], None],
) -> None:
    """Fill the report. Memory: a line or a recorded session, and the last prompts of the sessions last seen.

    A log that names its traces is taken at its word; else they are recognised, in the order of the log.
    """
    heads: OrderedDict[str, list[tuple[int, ...]]] = OrderedDict()
    numbers: OrderedDict[str, int] = OrderedDict()
    for file, kind in files:
        cached: dict[str, int | None] = {}
        try:
            for turn, name in _named(_turns(file, kind, report, cached)):
                report.requests += 1
                report.prompt_tokens += turn.input_tokens
                report.sessions += name not in numbers
                numbers[name] = numbers.get(name, 0) + 1
                known = heads.setdefault(name, [])
                heads.move_to_end(name)
                _turn(turn, name, numbers[name], known, cached.pop(turn.request_id, None), report, note)
                known[:] = [*(h for h in known if turn.blocks[: len(h)] != h), turn.blocks][-MAX_HEADS:]
                if len(heads) > MAX_SESSIONS:
                    old, _ = heads.popitem(last=False)
                    del numbers[old]
                    report.sessions_forgotten += 1
                on_request()
        except WorkloadError as e:  # ids that are no chain: what came before stands
            report.skip(e)


def _turn(
    turn: Turn,
    name: str,
    number: int,
    known: list[tuple[int, ...]],
    cached_tokens: int | None,
    report: Report,
    note: Callable[[Finding], None],
) -> None:
    before = max(known, key=lambda head: _shared(head, turn.blocks), default=None)
    if before is None:
        return
    at = _shared(before, turn.blocks)
    report.resumed += at > 0
    size = turn.block_size
    if not at:
        return
    missing = None
    if cached_tokens is not None:
        report.served += 1
        missing = served.exact(at * size, turn.input_tokens, cached_tokens, size)
    if missing is not None:
        block = cached_tokens // size + 1 if cached_tokens else 1
        note(Finding(name, turn.request_id, number, f"block {block}", missing[0], missing[1], block))
        return
    behind = min(len(before), len(turn.blocks)) - at
    if behind:
        note(Finding(name, turn.request_id, number, f"block {at + 1}", Cause.BLOCKS, behind * size, at + 1))


def _named(turns: Iterator[Turn]) -> Iterator[tuple[Turn, str]]:
    first = next(turns, None)
    if first is None:
        return
    everything = chain([first], turns)
    if first.session_id or first.trace_id:
        for turn in everything:
            yield turn, turn.session_id or turn.trace_id or turn.request_id
    else:
        for turn, link in links(everything, Identity(IdentityConfig())):
            yield turn, turn.session_id or link.trace_id


def _turns(file: Path, kind: Kind, report: Report, cached: dict[str, int | None]) -> Iterator[Turn]:
    if kind is Kind.WEKA:
        yield from weka.read([file], report.skip)
    elif kind is Kind.MOONCAKE:
        yield from mooncake.read(file, report.skip)
    else:
        counts = _served(file)
        for turn in requests.read(file, report.skip):
            record = next((r for r in counts if r.request_id == turn.request_id), None)
            cached[turn.request_id] = None if record is None else record.cached_tokens
            yield turn


def _served(file: Path) -> Iterator[_Served]:
    """What the lines of a request log say was cached: a `Turn` does not carry it, it is no load."""
    decoder = msgspec.json.Decoder(_Served)
    for line in lines(file):
        try:
            yield decoder.decode(line.data)
        except BAD_JSON:
            continue


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

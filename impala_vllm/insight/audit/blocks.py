"""Logs of block ids: only where a turn leaves the one before it, and how much lies behind."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from impala_vllm.core.identity import Identity, IdentityConfig
from impala_vllm.insight.audit.causes import Cause
from impala_vllm.insight.audit.report import Finding, Report
from impala_vllm.insight.audit.requests import Kind
from impala_vllm.workload import Format, Turn, links, read

MAX_SESSIONS = 4096
MAX_HEADS = 4
"""Prompts kept a session: sub-agents come between turns."""

_FORMATS = {Kind.REQUESTS: Format.REQUESTS, Kind.WEKA: Format.WEKA, Kind.MOONCAKE: Format.MOONCAKE}


def audit(
    path: Path, kind: Kind, report: Report, note: Callable[[Finding], None], on_request: Callable[[], None]
) -> None:
    """Fill the report. Holds the whole log, as `impala identify` does: its recordings are merged by time."""
    turns = sorted(read(path, _FORMATS[kind], report.skip), key=lambda turn: turn.arrival_s)
    heads: OrderedDict[str, list[tuple[int, ...]]] = OrderedDict()
    numbers: dict[str, int] = {}
    for turn, link in links(turns, Identity(IdentityConfig())):
        name = turn.session_id or link.trace_id
        report.requests += 1
        report.prompt_tokens += turn.input_tokens
        numbers[name] = numbers.get(name, 0) + 1
        known = heads.setdefault(name, [])
        heads.move_to_end(name)
        _turn(turn, name, numbers[name], known, report, note)
        known[:] = [*(h for h in known if turn.blocks[: len(h)] != h), turn.blocks][-MAX_HEADS:]
        if len(heads) > MAX_SESSIONS:
            heads.popitem(last=False)
            report.sessions_forgotten += 1
        on_request()
    report.sessions = len(numbers)


def _turn(
    turn: Turn, name: str, number: int, known: list[tuple[int, ...]], report: Report, note: Callable[[Finding], None]
) -> None:
    before = max(known, key=lambda head: _shared(head, turn.blocks), default=None)
    if before is None:
        return
    at = _shared(before, turn.blocks)
    report.resumed += at > 0
    behind = min(len(before), len(turn.blocks)) - at
    if at and behind:
        lost = behind * turn.block_size
        note(Finding(name, turn.request_id, number, f"block {at + 1}", Cause.BLOCKS, lost))


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

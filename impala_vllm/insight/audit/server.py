"""A running server's own account of its requests, audited: hashes and counts, since a server keeps no prompts.

It knows where a prompt leaves the turn before it and what it found in its cache, not what the text was.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from impala_vllm.core.types import Source
from impala_vllm.insight.audit import served
from impala_vllm.insight.audit.causes import Cause
from impala_vllm.insight.audit.report import Finding, Report, Worst

_GOES_ON = frozenset({Source.CONTINUATION.value, Source.EXPLICIT.value, Source.COMPACTION.value})
"""Turns that should begin with the one before; a retry, a step back or a fork need not."""


def audit(
    ranks: Iterable[tuple[int, Iterable[Mapping[str, Any]]]], on_finding: Callable[[Finding], None] | None = None
) -> Report:
    """The report on rows of `/impala/links`, oldest first: for each rank its block size in tokens and its rows.

    Tokens are exact. Turns that have not begun yet count as not served. `on_finding` gets every finding.
    """
    report = Report(estimated=False)
    for number, (block, rows) in enumerate(ranks):
        traces: dict[str, _Trace] = {}
        for row in rows:
            name = row["trace_id"] if number == 0 else f"rank {number} {row['trace_id']}"
            traces.setdefault(name, _Trace(name)).add(row, block, report, on_finding)
        report.sessions += len(traces)
        for trace in traces.values():
            report.end(Worst(trace.name, trace.num_turns, trace.num_findings, trace.lost_tokens))
    return report


class _Trace:
    def __init__(self, name: str) -> None:
        self.name = name
        self.num_turns = self.num_findings = self.lost_tokens = 0

    def add(
        self, row: Mapping[str, Any], block: int, report: Report, on_finding: Callable[[Finding], None] | None
    ) -> None:
        self.num_turns += 1
        report.requests += 1
        report.counted += 1
        report.prompt_tokens += row["prompt_tokens"]
        report.served += row["cached_tokens"] is not None
        found: tuple[Cause, int] | None = None
        known = row["matched_blocks"] * block
        follows = row["source"] in _GOES_ON and row["previous_prompt_tokens"] > 0
        report.resumed += follows
        if follows and row["prompt_tokens"] < block:
            found = Cause.SHORT, min(row["prompt_tokens"], row["previous_prompt_tokens"])
        elif follows:
            self._compare_answer(row, known, block, report)
            could = min(row["previous_prompt_tokens"], row["prompt_tokens"] - 1) // block * block
            if known < could:
                is_rewritten = row["source"] == Source.COMPACTION.value
                found = Cause.COMPACTED if is_rewritten else Cause.BLOCKS, could - known
        if found is None and row["cached_tokens"] is not None:
            found = served.exact(known, row["prompt_tokens"], row["cached_tokens"], block)
            known = min(known, row["cached_tokens"])
        if found is not None:
            self.num_findings += 1
            self.lost_tokens += found[1]
            finding = self._finding(row, *found, known // block + 1)
            report.note(finding)
            if on_finding is not None:
                on_finding(finding)

    def _compare_answer(self, row: Mapping[str, Any], known: int, block: int, report: Report) -> None:
        """Whether the turn goes on with the answer as it was given: its blocks are known too, then."""
        before, end = row["previous_prompt_tokens"], min(row["previous_tokens"], row["prompt_tokens"] - 1)
        if row["source"] != Source.CONTINUATION.value or end // block <= before // block:
            return  # no full block of it to compare
        report.answered += 1
        lost = end // block * block - max(known, before // block * block)
        if lost > 0:
            report.note_answer(self._finding(row, Cause.RERENDERED, lost, known // block + 1))

    def _finding(self, row: Mapping[str, Any], cause: Cause, lost_tokens: int, block: int) -> Finding:
        return Finding(self.name, row["request_id"], self.num_turns, f"block {block}", cause, lost_tokens, block)

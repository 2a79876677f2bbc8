"""Reads a log once and says of each turn whether it begins with the prompt before it, and if not, why."""

from collections.abc import Callable
from pathlib import Path

from impala_vllm.insight.audit import blocks
from impala_vllm.insight.audit.kinds import kinds
from impala_vllm.insight.audit.report import Finding, Report
from impala_vllm.insight.audit.texts import Texts
from impala_vllm.workload import Format, WorkloadError
from impala_vllm.workload.text_blocks import BLOCK_TOKENS

OnFinding = Callable[[Finding], None]


def audit(
    path: Path,
    form: Format = Format.AUTO,
    *,
    block_tokens: int = BLOCK_TOKENS,
    show_text: bool = False,
    normalised: bool = False,
    on_request: Callable[[], None] = lambda: None,
    on_finding: OnFinding | None = None,
) -> Report:
    """The report on a log or a directory of logs. Raises WorkloadError where nothing in it is usable.

    Memory is bounded: the last prompts of the sessions last seen, a quarter of a GiB in all. Text of
    prompts reaches the report only with `show_text`. `on_finding` gets every finding; `block_tokens` is
    the block of the server behind a log of text, logs of block ids know their own. With `normalised`, known nonces in
    system prompts count as held fast (`normalise`).
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
        Texts(report, note, on_request, block_tokens=block_tokens, show_text=show_text, normalised=normalised).run(
            texts
        )
    elif found:
        report.estimated = False
        blocks.audit(found, report, note, on_request)
    if not report.requests:
        raise WorkloadError(report.first_error or f"{path}: no request in it; give a log with at least one")
    return report


def _noting(report: Report, on_finding: OnFinding | None) -> OnFinding:
    def note(finding: Finding) -> None:
        report.note(finding)
        if on_finding is not None:
            on_finding(finding)

    return note

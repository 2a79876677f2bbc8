"""Request logs: block ids as an engine or a gateway writes them (`--format requests`)."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from impala_vllm.core.types import Outcome
from impala_vllm.workload.source import OnError, WorkloadError, records
from impala_vllm.workload.turn import Turn

OUTCOMES = {
    "stop": Outcome.STOP,
    "end_turn": Outcome.STOP,
    "tool_calls": Outcome.TOOL_CALL,
    "tool_call": Outcome.TOOL_CALL,
    "tool_use": Outcome.TOOL_CALL,
    "length": Outcome.LENGTH,
    "max_tokens": Outcome.LENGTH,
    "abort": Outcome.ABORT,
    "error": Outcome.ERROR,
}
"""Finish reasons as OpenAI, Anthropic and vLLM spell them."""


class _Record(msgspec.Struct):
    request_id: str
    arrival_s: float
    block_size: int
    block_ids: list[int]
    input_tokens: int
    output_tokens: int | None = None
    finish_s: float | None = None
    model: str | None = None
    tenant: str | None = None
    output_block_ids: list[int] | None = None
    finish_reason: str | None = None
    tool: str | None = None
    session_id: str | None = None
    trace_id: str | None = None
    parent_trace_id: str | None = None


def read(file: Path, on_error: OnError) -> Iterator[Turn]:
    """Turns of one file, in its order, which must be the order of arrival."""
    decoder = msgspec.json.Decoder(_Record)
    latest = float("-inf")
    seen: set[str] = set()
    for record, where in records(file, decoder, on_error):
        problem = _problem(record, latest, seen)
        if problem is not None:
            on_error(WorkloadError(f"{where}: {problem}"))
            continue
        latest = record.arrival_s
        seen.add(record.request_id)
        yield Turn(
            request_id=record.request_id,
            arrival_s=record.arrival_s,
            finish_s=record.finish_s,
            blocks=tuple(record.block_ids),
            block_size=record.block_size,
            input_tokens=record.input_tokens,
            output_tokens=record.output_tokens,
            output_blocks=tuple(record.output_block_ids or ()),
            outcome=OUTCOMES.get(record.finish_reason or "", Outcome.UNKNOWN),
            tool=record.tool,
            model=record.model or "",
            tenant=record.tenant or "",
            session_id=record.session_id,
            recording=str(file),
            trace_id=record.trace_id,
            parent_trace_id=record.parent_trace_id,
        )


def _problem(record: _Record, latest: float, seen: set[str]) -> str | None:
    if record.block_size < 1:
        return f"block_size is {record.block_size}; write the tokens a block holds"
    if record.input_tokens < 0:
        return f"input_tokens is {record.input_tokens}; write the tokens of the prompt"
    if len(set(record.block_ids)) != len(record.block_ids):
        return "an id comes twice in block_ids; write ids that stand for a block and all before it"
    if record.arrival_s < latest:
        return f"arrival_s {record.arrival_s} comes after {latest}; sort the log by arrival_s"
    if record.finish_s is not None and record.finish_s < record.arrival_s:
        return f"finish_s {record.finish_s} is before arrival_s {record.arrival_s}; mend one of them"
    if record.request_id in seen:
        return f"request_id {record.request_id} was there before; give every request an id of its own"
    return None

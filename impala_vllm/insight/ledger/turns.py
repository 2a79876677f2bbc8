"""Ledger records as the turns of a log, for the simulator: lengths, times and shared prefixes, without contents.

What a row calls known was the beginning of the turn it follows, or of the stem that its trace opened with; the
rest of a prompt is nobody else's. So forks into another trace's context count as new.
"""

from collections.abc import Iterable
from itertools import count

from impala_vllm.core.types import Outcome
from impala_vllm.insight.ledger.record import Record
from impala_vllm.workload import Turn


def turns(records: Iterable[Record], block_size: int) -> list[Turn]:
    """In order of arrival. Records without rows give none."""
    ids = count()
    stems: dict[str, list[int]] = {}
    found: list[Turn] = []
    for record in records:
        stem = stems.setdefault(record.stem, []) if record.stem is not None else []
        found += _turns(record, block_size, stem, ids)
    found.sort(key=lambda t: t.arrival_s)
    return found


def _turns(record: Record, size: int, stem: list[int], ids: "count[int]") -> list[Turn]:
    contexts: list[list[int]] = []
    """Block ids of prompt and output, by row."""
    found: list[Turn] = []
    for number, (start_ms, took_ms, prompt, output, known, back) in enumerate(record.log):
        before = contexts[number - back] if 0 < back <= number else _extended(stem, known // size, ids)
        shared = before[: min(known, prompt) // size]
        blocks = shared + [next(ids) for _ in range(prompt // size - len(shared))]
        filled = [next(ids) for _ in range((prompt + output) // size - len(blocks))]
        contexts.append(blocks + filled)
        if prompt == 0:  # it ended before vLLM counted anything of it
            continue
        arrival_s = record.start + start_ms / 1e3
        is_last = number == len(record.log) - 1
        found.append(
            Turn(
                request_id=f"{record.trace}/{number}",
                arrival_s=arrival_s,
                finish_s=arrival_s + took_ms / 1e3,
                blocks=tuple(blocks),
                block_size=size,
                input_tokens=prompt,
                output_tokens=max(1, output),
                output_blocks=tuple(filled),
                outcome=Outcome.STOP if is_last else Outcome.TOOL_CALL,
                tenant=record.tenant or "",
                trace_id=record.trace,
                parent_trace_id=record.parent,
            )
        )
    return found


def _extended(stem: list[int], num_blocks: int, ids: "count[int]") -> list[int]:
    stem += [next(ids) for _ in range(num_blocks - len(stem))]
    return stem

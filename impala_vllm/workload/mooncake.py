"""Mooncake traces (github.com/kvcache-ai/Mooncake): 512-token block ids, milliseconds, no sessions."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from impala_vllm.workload.source import OnError, records
from impala_vllm.workload.turn import Turn

BLOCK_TOKENS = 512
"""The traces' own block size; their last block may be partial."""


class _Record(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read(file: Path, on_error: OnError) -> Iterator[Turn]:
    """Turns of one file, in its order."""
    for number, (record, _) in enumerate(records(file, msgspec.json.Decoder(_Record), on_error)):
        yield Turn(
            request_id=f"{file.name}#{number}",
            arrival_s=record.timestamp / 1000,
            finish_s=None,
            blocks=tuple(record.hash_ids[: record.input_length // BLOCK_TOKENS]),
            block_size=BLOCK_TOKENS,
            input_tokens=record.input_length,
            output_tokens=record.output_length,
            recording=str(file),
        )

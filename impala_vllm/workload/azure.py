"""Azure LLM inference traces (github.com/Azure/AzurePublicDataset): arrivals and lengths, no prompts.

Good for arrival processes and for traffic that is not agents; no two requests share a block.
"""

import csv
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from impala_vllm.workload.source import OnError, WorkloadError, lines
from impala_vllm.workload.turn import Turn

HEADER = b"TIMESTAMP,ContextTokens,GeneratedTokens"
BLOCK_TOKENS = 16


def read(file: Path, on_error: OnError) -> Iterator[Turn]:
    """Turns of one file; the first arrives at zero."""
    start: datetime | None = None
    next_block = 0
    for number, line in enumerate(lines(file)):
        if number == 0 and line.data.startswith(HEADER):
            continue
        try:
            stamp, context, generated = next(csv.reader([line.data.decode()]))
            # Seven decimals in the files, six in a datetime; a zone would be the same in every line.
            when = datetime.fromisoformat(stamp[:26]).replace(tzinfo=None)
            input_tokens, output_tokens = int(context), int(generated)
        except (ValueError, csv.Error) as e:
            on_error(WorkloadError(f"{line.where}: {e}; write TIMESTAMP,ContextTokens,GeneratedTokens"))
            continue
        start = start or when
        num_blocks = input_tokens // BLOCK_TOKENS
        yield Turn(
            request_id=f"{file.name}#{number}",
            arrival_s=(when - start).total_seconds(),
            finish_s=None,
            blocks=tuple(range(next_block, next_block + num_blocks)),
            block_size=BLOCK_TOKENS,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            recording=str(file),
        )
        next_block += num_blocks

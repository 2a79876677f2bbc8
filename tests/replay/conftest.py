"""Recorded turns and vocabularies small enough to read."""

from collections.abc import Callable

import pytest

from impala_vllm.core.types import Outcome
from impala_vllm.replay.vocabulary import Vocabulary
from impala_vllm.workload import Turn

BLOCK = 64


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary(first_plain=10, last_plain=4000, eos=2, tool_call=3)


@pytest.fixture
def recorded() -> Callable[..., Turn]:
    """A recorded turn of `blocks` full blocks plus `tail` tokens; takes half a second."""

    def make(
        trace: str, index: int, blocks: list[int], *, at: float = 0.0, tail: int = 0, output: int = 64,
        outcome: Outcome = Outcome.TOOL_CALL, parent: str | None = None, lasts: float = 0.5,
    ) -> Turn:  # fmt: skip
        return Turn(
            request_id=f"{trace}#{index}",
            arrival_s=at,
            finish_s=at + lasts,
            blocks=tuple(blocks),
            block_size=BLOCK,
            input_tokens=len(blocks) * BLOCK + tail,
            output_tokens=output,
            outcome=outcome,
            recording=trace,
            trace_id=trace,
            parent_trace_id=parent,
        )

    return make

"""Sessions for the engine steps, at a size that fits: recorded ones, or made-up ones of their shape where no log can
be read.

`python -m benchmarks.gpu.traces [LOG]` writes `.gpu/sessions.jsonl`, a choice that travels to a machine without logs.
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.bundle import BUNDLES
from impala_vllm.core.types import Outcome
from impala_vllm.replay.plan import Plan, PlannedSession, PlannedTurn
from impala_vllm.replay.vocabulary import Vocabulary

if TYPE_CHECKING:
    from impala_vllm.workload import Turn

PREPARED = BUNDLES / "sessions.jsonl"
NUM_SESSIONS = 16
NUM_TURNS = 8
GAP = 6.0
"""Recorded gaps are divided by this, as in the project's other replays."""
MAX_GAP_S = 6.0
MAX_OUTPUT_TOKENS = 64
FACTORS = tuple(1 << i for i in range(9))
PROMPT_SHARE = 0.9
"""Of the context: outputs shrink less than prompts."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a replay may take of the engine at hand."""

    max_context_tokens: int
    prefill_tokens_per_s: float
    prefill_s: float
    """For all prompts, were nothing cached."""

    def factor(self, prompts: Sequence[int]) -> int:
        """By how much prompts of these lengths must shrink to fit the time and the context."""
        most = self.prefill_tokens_per_s * self.prefill_s
        for factor in FACTORS:
            fits_context = max(prompts, default=0) / factor <= PROMPT_SHARE * self.max_context_tokens
            if fits_context and sum(prompts) / factor <= most:
                return factor
        return FACTORS[-1]


@dataclass(frozen=True, slots=True)
class Sessions:
    """A plan, and what it was made of."""

    plan: Plan
    source: str
    scale: str


def sessions(room: Room, words: Vocabulary, log: Path | None = None, num_sessions: int = NUM_SESSIONS) -> Sessions:
    """Same arguments, same plan. Without `log`: the prepared choice, else the log we ship, else made-up sessions.

    Raises WorkloadError for a log that holds nothing fit.
    """
    path = log or (PREPARED if PREPARED.exists() else None)
    try:
        return _recorded(path, room, words, num_sessions)
    except ImportError:  # zstandard or msgspec is missing here
        return _made_up(room, words, num_sessions)


def prepare(log: Path | None, target: Path = PREPARED) -> int:
    """Write the first turns of a choice of sessions as a plain request log; returns how many."""
    turns = sorted(_first_turns(_choose(log, NUM_SESSIONS)), key=lambda t: t.arrival_s)
    records = [
        {
            "request_id": t.request_id,
            "arrival_s": t.arrival_s,
            "finish_s": t.finish_s,
            "block_size": t.block_size,
            "block_ids": list(t.blocks),
            "input_tokens": t.input_tokens,
            "output_tokens": t.output_tokens,
            "finish_reason": _REASONS.get(t.outcome),
            "tool": t.tool,
            "trace_id": t.trace_id,
            "parent_trace_id": t.parent_trace_id,
        }
        for t in turns
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps({k: v for k, v in record.items() if v is not None}) + "\n")
    return len(records)


_REASONS = {
    Outcome.STOP: "stop",
    Outcome.TOOL_CALL: "tool_calls",
    Outcome.LENGTH: "length",
    Outcome.ABORT: "abort",
    Outcome.ERROR: "error",
}


def _recorded(path: Path | None, room: Room, words: Vocabulary, num_sessions: int) -> Sessions:
    from impala_vllm.replay.lowering import Scale, lower

    turns = list(_first_turns(_choose(path, num_sessions)))
    factor = room.factor([t.input_tokens for t in turns])
    scale = Scale(
        prompt=factor,
        output=8,
        max_output_tokens=MAX_OUTPUT_TOKENS,
        gap=GAP,
        max_gap_s=MAX_GAP_S,
        max_context_tokens=room.max_context_tokens,
    )
    described = replace(scale, num_turns=NUM_TURNS).describe()
    return Sessions(lower(turns, scale, words), path.name if path else "bundled sessions", described)


def _choose(path: Path | None, num_sessions: int) -> list["Turn"]:
    """As many sessions of more than one turn as there are, up to `num_sessions`."""
    from impala_vllm.replay import recording
    from impala_vllm.workload import WorkloadError

    log = path or recording.bundled()
    try:
        return recording.choose(log, num_sessions, min_turns=2)
    except WorkloadError:
        return recording.choose(log, min_turns=2)


def _first_turns(turns: Iterable["Turn"]) -> Iterator["Turn"]:
    seen: dict[str, int] = {}
    for turn in turns:
        trace = turn.trace_id or turn.request_id
        seen[trace] = seen.get(trace, 0) + 1
        if seen[trace] <= NUM_TURNS:
            yield turn


def _made_up(room: Room, words: Vocabulary, num_sessions: int) -> Sessions:
    """Sizes about as in the recorded sessions: a shared opening, prompts that only grow, most gaps short."""
    rng = random.Random(0)
    lengths: list[list[int]] = []
    for _ in range(num_sessions):
        first = int(min(max(rng.lognormvariate(10.2, 0.7), 12_000), 120_000))
        grown = [int(min(rng.lognormvariate(8.2, 1.0), 30_000)) for _ in range(NUM_TURNS - 1)]
        lengths.append([first + sum(grown[:i]) for i in range(NUM_TURNS)])
    factor = room.factor([n for one in lengths for n in one])
    stem = 10_000 // factor
    planned: list[PlannedSession] = []
    for number, one in enumerate(lengths):
        name = f"made-up-{number}"
        text = words.text("stem", stem)
        turns: list[PlannedTurn] = []
        for i, length in enumerate(one):
            text += words.text(f"{name}/{i}", max(1, length // factor - len(text)))
            output = words.text(f"{name}/out/{i}", rng.randint(16, MAX_OUTPUT_TOKENS))
            gap_s = min(rng.lognormvariate(0.3, 1.4) / GAP, MAX_GAP_S) if i else 0.0
            turns.append(PlannedTurn(f"{name}/{i}", text, output, gap_s))
            text += output
        planned.append(PlannedSession(name, tuple(turns)))
    return Sessions(Plan(tuple(planned)), "made-up sessions", f"prompts /{factor}, gaps /{GAP:g}")


if __name__ == "__main__":
    count = prepare(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    print(f"{count} turns in {PREPARED}")

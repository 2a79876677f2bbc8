"""What a fleet in virtual time is asked: recorded sessions, or synthetic agents as `benchmarks.fleet` sends them."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from impala_vllm.fleet.places import BlockKey, key_of
from impala_vllm.workload import WorkloadError, load

BLOCK_TOKENS, RECORDED_BLOCK_TOKENS = 16, 64
"""Of what is sent (`chats` has as many words for each recorded block), and of the recording."""
MAX_GAP_S = 120.0
MIN_TURNS = 3
"""Shorter ones are left out."""
MAX_TOKENS = 131_072
"""A recording stops before the first prompt that is longer: the model of the timing takes no more."""
_SPREAD = 0x9E3779B97F4A7C15


class Step(NamedTuple):
    """A turn of a session."""

    keys: list[BlockKey]
    num_tokens: int
    block_tokens: int
    num_output: int
    gap_s: float
    """After the turn before."""


def recorded(path: Path, num_turns: int, coarser: int = 1, max_gap_s: float = MAX_GAP_S) -> list[list[Step]]:
    """The first turns of each recorded trace, in order, with the gaps between them, longer ones cut short.

    `coarser`: so many blocks are taken as one. A chained key says all that its predecessors say.
    """
    found: dict[str, list[Any]] = {}
    for turn in load(path):
        found.setdefault(turn.trace_id or turn.request_id, []).append(turn)
    sessions: list[list[Step]] = []
    for turns in found.values():
        turns.sort(key=lambda t: t.arrival_s)
        steps: list[Step] = []
        end_s = turns[0].arrival_s
        for turn in turns[:num_turns]:
            if turn.input_tokens > MAX_TOKENS:
                break
            keys = [key_of((block + 1) * _SPREAD) for block in turn.blocks[coarser - 1 :: coarser]]
            gap_s = min(max_gap_s, max(0.0, turn.arrival_s - end_s))
            num_output = min(turn.output_tokens or 100, 1000)
            steps.append(Step(keys, turn.input_tokens, turn.block_size * coarser, num_output, gap_s))
            end_s = turn.finish_s if turn.finish_s is not None else turn.arrival_s
        if len(steps) >= MIN_TURNS:
            sessions.append(steps)
    return sessions


def scaled(path: Path, num_turns: int, scale: int, max_gap_s: float) -> list[list[Step]]:
    """As `recorded`, for sending at a `scale`-th as words. Raises WorkloadError where nothing in it can be."""
    coarser, rest = divmod(scale * BLOCK_TOKENS, RECORDED_BLOCK_TOKENS)
    assert coarser, scale
    assert not rest, scale
    pool = recorded(path, num_turns, coarser, max_gap_s)
    if not pool:
        raise WorkloadError(f"{path.name}: no session of {MIN_TURNS} turns; give a longer log")
    if odd := {step.block_tokens // coarser for steps in pool for step in steps} - {RECORDED_BLOCK_TOKENS}:
        raise WorkloadError(
            f"{path.name}: blocks of {min(odd)} tokens, and only those of {RECORDED_BLOCK_TOKENS} become words here; "
            "give another log"
        )
    return pool


def chosen(pool: Sequence[list[Step]], number: int, lot: Random) -> list[list[Step]]:
    """So many of them by lot. Where there are fewer, copies that share nothing with one another."""
    sessions: list[list[Step]] = []
    for copy in range(-(-number // len(pool))):
        drawn = lot.sample(pool, min(len(pool), number - len(sessions)))
        sessions += [_copied(steps, copy) for steps in drawn] if copy else drawn
    return sessions


def _copied(steps: Sequence[Step], copy: int) -> list[Step]:
    mask = key_of(copy * _SPREAD)
    return [step._replace(keys=[BlockKey(key ^ mask) for key in step.keys]) for step in steps]


def agents(number: int, num_turns: int, lot: Random) -> list[list[Step]]:
    """A shared opening, then turns of 100 to 900 words and gaps of a second, as the tiny model's tokenizer counts."""
    opening = [BlockKey(lot.getrandbits(64)) for _ in range(75)]
    sessions: list[list[Step]] = []
    for _ in range(number):
        keys, num_tokens, steps = list(opening), 1200, list[Step]()
        for turn in range(num_turns):
            num_tokens += int(1.6 * lot.randrange(100, 900)) + 20
            keys += [BlockKey(lot.getrandbits(64)) for _ in range(num_tokens // 16 - len(keys))]
            steps.append(Step(list(keys), num_tokens, 16, 8, lot.expovariate(1.0) if turn else 0.0))
            num_tokens += 20
        sessions.append(steps)
    return sessions

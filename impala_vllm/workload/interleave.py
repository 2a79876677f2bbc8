"""Makes recordings overlap: each starts at a seeded time of its own, inside they keep their pace."""

import dataclasses
from collections.abc import Iterable
from random import Random

from impala_vllm.workload.turn import Turn


def interleave(turns: Iterable[Turn], spread_s: float, rng: Random) -> list[Turn]:
    """All turns in order of arrival, recordings starting uniformly within `spread_s`."""
    recordings: dict[str, list[Turn]] = {}
    for turn in turns:
        recordings.setdefault(turn.recording, []).append(turn)
    moved: list[Turn] = []
    for recording in recordings.values():
        shift = rng.uniform(0, spread_s) - min(turn.arrival_s for turn in recording)
        moved += [
            dataclasses.replace(
                turn,
                arrival_s=turn.arrival_s + shift,
                finish_s=None if turn.finish_s is None else turn.finish_s + shift,
            )
            for turn in recording
        ]
    moved.sort(key=lambda turn: turn.arrival_s)
    return moved

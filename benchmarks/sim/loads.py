"""What the study serves: recorded agents, recorded requests, labelling jobs on one stem, and a mix of the three."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count
from pathlib import Path
from random import Random

from impala_vllm.core.types import Outcome
from impala_vllm.sim import recorded
from impala_vllm.sim.recognised import recognise
from impala_vllm.sim.sessions import Session, Turn, Workload
from impala_vllm.sim.simulation import choose
from impala_vllm.workload import Turn as Recorded
from impala_vllm.workload.read import load
from impala_vllm.workload.source import WorkloadError

BLOCK = 512
"""Tokens; blocks of logs are merged to it."""
STEM_TOKENS, ITEM_TOKENS, LABEL_TOKENS = 8192, 512, 64
"""Of a labelling job: its instructions, its item, its answer."""


@dataclass(frozen=True, slots=True)
class Logs:
    """Read once. `requests` None: no such workload."""

    agents: Workload
    requests: Workload | None
    """In sessions, as `impala simulate` recognises them."""

    def make(self, name: str, num_tasks: int, max_turns: int, seed: int) -> Workload:
        """So many tasks of one kind, picked by `seed`. Labelling jobs and requests are ten to a task.

        Requests come as they were recorded; all others start evenly.
        """
        rng = Random(seed)
        if name == "agents":
            return choose(_short(self.agents, max_turns), num_tasks, seed)
        if name == "labelling":
            return labelling(10 * num_tasks, rng)
        assert self.requests is not None
        if name == "requests":
            return window(self.requests, 10 * num_tasks, rng)
        third = max(1, num_tasks // 3)
        agents = choose(_short(self.agents, max_turns), third, seed)
        return mixed((agents, labelling(10 * third, rng), window(self.requests, 10 * third, rng)), rng)


def names(has_requests: bool) -> tuple[str, ...]:
    """Of the workloads there are, with or without a log of requests."""
    return ("agents", "requests", "labelling", "mix") if has_requests else ("agents", "labelling")


def read(agents: Path, requests: Path | None) -> Logs:
    """Raises WorkloadError with one line."""
    log = _turns(agents)
    singles = recognise(_turns(requests)).turns if requests is not None else None
    return Logs(_merged(log), _merged(singles) if singles is not None else None)


def window(log: Workload, count: int, rng: Random) -> Workload:
    """Sessions that began one after the other, with at least `count` requests if the log has them.

    Requests picked one by one would share nothing, and those of a minute little: what they follow is older.
    """
    roots = log.roots()
    sizes = [sum(len(s.turns) for s in log.family(root)) for root in roots]
    left = list(accumulate(reversed(sizes)))[::-1]
    start = rng.randrange(max(1, sum(rest >= count for rest in left)))
    num = next((i for i, taken in enumerate(accumulate(sizes[start:]), 1) if taken >= count), len(roots))
    return log.only(roots[start : start + num])


def labelling(num_jobs: int, rng: Random) -> Workload:
    """One-turn jobs behind the same instructions."""
    fresh = count(10**9)
    stem = tuple(next(fresh) for _ in range(STEM_TOKENS // BLOCK))
    made: list[Session] = []
    for i in range(num_jobs):
        item = round(ITEM_TOKENS * rng.uniform(0.5, 4.0))
        prompt = STEM_TOKENS + item
        own = tuple(next(fresh) for _ in range((prompt + LABEL_TOKENS) // BLOCK - len(stem)))
        made.append(Session(f"job{i}", (Turn(f"job{i}.0", stem + own, prompt, LABEL_TOKENS, outcome=Outcome.STOP),)))
    return Workload(BLOCK, tuple(made))


def mixed(parts: Sequence[Workload], rng: Random) -> Workload:
    """All of them as one: blocks of different parts are different, and each part's tasks stay in their order."""
    apart = [_apart(part, number, len(parts)) for number, part in enumerate(parts)]
    left = [iter(part.roots()) for part in apart]
    turns = [number for number, part in enumerate(apart) for _ in part.roots()]
    rng.shuffle(turns)
    everything = Workload(BLOCK, tuple(s for part in apart for s in part.sessions))
    return everything.only([next(left[number]) for number in turns])


def _apart(part: Workload, number: int, num_parts: int) -> Workload:
    """The same with keys that no other part has: each log counts its blocks from the same small numbers."""
    return replace(
        part,
        sessions=tuple(
            replace(s, turns=tuple(replace(t, keys=tuple(num_parts * k + number for k in t.keys)) for t in s.turns))
            for s in part.sessions
        ),
    )


def _turns(path: Path) -> Sequence[Recorded]:
    turns = load(path)
    sizes = {t.block_size for t in turns}
    if len(sizes) != 1 or BLOCK % min(sizes):
        raise WorkloadError(f"{path}: blocks of {sorted(sizes)} tokens cannot be merged to {BLOCK}; give another log")
    return turns


def _merged(turns: Sequence[Recorded]) -> Workload:
    return recorded.workload(turns, BLOCK // turns[0].block_size)[0]


def _short(load: Workload, max_turns: int) -> Workload:
    """The first turns of each task's own session; what later ones launch is gone."""
    roots = load.roots()
    kept: list[Session] = []
    for root in roots:
        turns = _cut(root.turns, max_turns)
        kept.append(replace(root, turns=turns))
        below = [s for s in load.family(root)[1:] if s.parent_id == root.session_id and s.after_turn < len(turns) - 1]
        kept += [replace(s, turns=_cut(s.turns, max_turns)) for s in below]
    return replace(load, sessions=tuple(kept))


def _cut(turns: Sequence[Turn], max_turns: int) -> tuple[Turn, ...]:
    if len(turns) <= max_turns:
        return tuple(turns)
    return (*turns[: max_turns - 1], replace(turns[max_turns - 1], next_gap_s=None))

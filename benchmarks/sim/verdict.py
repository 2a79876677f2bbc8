"""impala at a point of the study: against the best of its rivals, against bounds, and against the bars."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.sim.cells import PAYING
from benchmarks.sim.grid import BOTH, Point
from impala_vllm.replay.measures import mean
from impala_vllm.sim.measures import Measures
from impala_vllm.sim.policies import KINDS

MOST_STALL, LEAST_TASKS = 1.02, 0.99
"""Of the best rival: within this impala wins, or is as good."""
LEAST_HITS = 0.97
"""Of an infinite cache's, with host and NVMe."""
MOST_MISSES = 1.25
"""Of Belady's MIN's, on HBM alone."""
LEAST_STALL_S = 0.01
"""Stalls below it are alike."""

ByPolicy = Mapping[str, Sequence[Measures]]
"""By seed; bounds have fewer."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Means over seeds."""

    point: Point
    level: float
    """Working set over HBM as it was."""
    best: str
    """The rival with the least mean stall."""
    busiest: str
    """The rival that ends most tasks."""
    stall: Sequence[float]
    """impala's over the best rival's, seed by seed."""
    tasks: Sequence[float]
    """Tasks an hour, over the busiest rival's."""
    paying: tuple[float, float] | None
    """Both where impala pays for deciding; None: not run."""
    to_bound: float
    """Stall over the bound's that has least."""
    hits: float | None
    """Hit ratio over an infinite cache's; None: not run."""
    misses: float | None
    """Over those of Belady's MIN under impala's schedule; None: not counted."""
    held_s: float
    best_held_s: float
    """Longest time that impala and the best rival kept a turn back."""

    @property
    def stalls_little(self) -> bool:
        return mean(self.stall) <= MOST_STALL

    @property
    def ends_many(self) -> bool:
        return mean(self.tasks) >= LEAST_TASKS

    @property
    def wins(self) -> bool:
        return self.stalls_little and self.ends_many

    @property
    def finds_enough(self) -> bool | None:
        """Where tiers should make it so; None elsewhere."""
        return None if self.hits is None or self.point.tiers != BOTH else self.hits >= LEAST_HITS

    @property
    def misses_little(self) -> bool | None:
        return None if self.misses is None else self.misses <= MOST_MISSES

    @property
    def wins_paying(self) -> bool | None:
        return None if self.paying is None else self.paying[0] <= MOST_STALL and self.paying[1] >= LEAST_TASKS


def judge(
    point: Point, by_policy: ByPolicy, level: float | None = None, misses: tuple[int, int] | None = None
) -> Verdict:
    """`level`: what the point's came to. `misses`: impala's and Belady's MIN's, over all seeds."""
    ours = by_policy["impala"]
    rivals = [n for n in by_policy if n not in ("impala", PAYING) and not KINDS[n].is_bound]
    best = min(rivals, key=lambda n: stall_s(by_policy[n]))
    busiest = max(rivals, key=lambda n: mean([m.tasks_per_hour for m in by_policy[n]]))
    bounds = [over(ours, by_policy[n]) for n in by_policy if n in KINDS and KINDS[n].is_bound]
    stall, tasks = _stalls(ours, by_policy[best]), _tasks(ours, by_policy[busiest])
    paying = None
    if PAYING in by_policy:
        paying = mean(_stalls(by_policy[PAYING], by_policy[best])), mean(_tasks(by_policy[PAYING], by_policy[busiest]))
    hits = None
    if "unbounded" in by_policy:
        hits = mean([a.hit_ratio for a in ours]) / max(1e-9, mean([a.hit_ratio for a in by_policy["unbounded"]]))
    held_s, best_held_s = (max(m.max_hold_s for m in by_policy[n]) for n in ("impala", best))
    to_bound = max(bounds, default=1.0)
    return Verdict(
        point, point.level if level is None else level, best, busiest, stall, tasks, paying, to_bound, hits,
        None if misses is None else misses[0] / misses[1] if misses[1] else 1.0, held_s, best_held_s,
    )  # fmt: skip


def stall_s(found: Sequence[Measures]) -> float:
    return mean([max(LEAST_STALL_S, m.stall_mean_s) for m in found])


def over(found: Sequence[Measures], base: Sequence[Measures]) -> float:
    """Mean stall over that of `base`, over the seeds that both have."""
    count = min(len(found), len(base))
    return stall_s(found[:count]) / stall_s(base[:count])


def _stalls(ours: Sequence[Measures], theirs: Sequence[Measures]) -> list[float]:
    return [stall_s([a]) / stall_s([b]) for a, b in zip(ours, theirs, strict=True)]


def _tasks(ours: Sequence[Measures], theirs: Sequence[Measures]) -> list[float]:
    return [a.tasks_per_hour / b.tasks_per_hour for a, b in zip(ours, theirs, strict=True)]

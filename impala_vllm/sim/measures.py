"""What a simulation says, in the words of the design: stall, JCT, tasks/h, hit ratio, recomputed tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from impala_vllm.sim.client import Served


@dataclass(frozen=True, slots=True)
class Task:
    """One root session with all below it."""

    start_s: float
    jct_s: float
    """First arrival to last end."""
    gaps_s: float
    """Tool time on the path of turns that ends with its last one."""

    @property
    def stall_s(self) -> float:
        return self.jct_s - self.gaps_s


@dataclass(frozen=True, slots=True)
class Measures:
    """A run in figures; the contract of `impala simulate --json`."""

    stall_mean_s: float
    stall_p95_s: float
    jct_mean_s: float
    jct_p50_s: float
    jct_p95_s: float
    makespan_s: float
    tasks_per_hour: float
    hit_ratio: float
    """Prompt tokens found, over all prompt tokens."""
    recomputed_tokens: int
    """Prompt tokens in blocks that had been computed before in the run."""
    resume_ttft_p50_s: float | None
    """None: no session has a second turn."""
    resume_ttft_p95_s: float | None
    bytes_moved: int
    """Between tiers, both ways."""
    max_hold_s: float
    """Longest time that policy kept a turn back."""


def measure(served: Sequence[Served], recomputed_tokens: int, bytes_moved: int = 0) -> Measures:
    """Figures of a run that served at least one turn."""
    per_task = tasks(served)
    jct, stall = [t.jct_s for t in per_task], [t.stall_s for t in per_task]
    begin_s, end_s = min(s.start_s for s in served), max(s.end_s for s in served)
    resumes = [s.first_s - s.start_s for s in served if s.index > 0]
    return Measures(
        stall_mean_s=sum(stall) / len(stall),
        stall_p95_s=quantile(stall, 0.95),
        jct_mean_s=sum(jct) / len(jct),
        jct_p50_s=quantile(jct, 0.5),
        jct_p95_s=quantile(jct, 0.95),
        makespan_s=end_s - begin_s,
        tasks_per_hour=len(per_task) / (end_s - begin_s) * 3600,
        hit_ratio=sum(s.cached_tokens for s in served) / sum(s.prompt_tokens for s in served),
        recomputed_tokens=recomputed_tokens,
        resume_ttft_p50_s=quantile(resumes, 0.5) if resumes else None,
        resume_ttft_p95_s=quantile(resumes, 0.95) if resumes else None,
        bytes_moved=bytes_moved,
        max_hold_s=max(s.held_s for s in served),
    )


def tasks(served: Iterable[Served]) -> list[Task]:
    """Tasks in order of arrival."""
    by_root: dict[str, list[Served]] = {}
    for turn in served:
        by_root.setdefault(turn.root_id, []).append(turn)
    return sorted(map(_task, by_root.values()), key=lambda t: t.start_s)


def quantile(values: Iterable[float], q: float) -> float:
    """Linear interpolation between order statistics of at least one value."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def _task(turns: list[Served]) -> Task:
    first, last = min(turns, key=lambda t: t.start_s), max(turns, key=lambda t: t.end_s)
    return Task(first.start_s, last.end_s - first.start_s, last.tools_s - first.tools_s)

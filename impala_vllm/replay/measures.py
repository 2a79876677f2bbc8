"""What a replay says, in the words of the design: JCT, stall, tasks/h, resume latency, cached share.

Pure arithmetic over a `Run`; means hide tails, so the tails are there too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from impala_vllm.replay.load import Run, TurnResult


@dataclass(frozen=True, slots=True)
class Task:
    """One root session with the children it waited for."""

    session_id: str
    start_s: float
    jct_s: float
    """First arrival to last end."""
    gaps_s: float
    """Tool time on the path of turns that ends with its last one."""
    num_turns: int
    num_failed: int

    @property
    def stall_s(self) -> float:
        """The part of JCT a server can change."""
        return self.jct_s - self.gaps_s


@dataclass(frozen=True, slots=True)
class Measures:
    """A run in figures. None: cannot be told from this run."""

    num_tasks: int
    num_turns: int
    num_failed: int
    makespan_s: float
    tasks_per_hour: float
    requests_per_s: float
    output_tokens_per_s: float
    jct_mean_s: float
    jct_p50_s: float
    jct_p95_s: float
    stall_mean_s: float
    stall_p50_s: float
    stall_p95_s: float
    stall_p99_s: float
    gaps_mean_s: float
    resume_ttft_p50_s: float | None
    resume_ttft_p95_s: float | None
    prompt_tokens: int
    output_tokens: int
    cached_share: float
    """Prompt tokens that clients were told were cached."""
    computed_tokens: int | None = None
    """Prompt tokens the engine computed, by its own counters."""
    recomputed_tokens: int | None = None
    """Those an infinite cache would not have computed."""
    hit_bound: float | None = None
    """Cached share of an infinite cache."""
    cpu_s: float | None = None
    """CPU seconds of the server's processes."""


def tasks(run: Run) -> list[Task]:
    """Root sessions in order of arrival."""
    turns: dict[str, list[TurnResult]] = {}
    roots: dict[str, str] = {r.session_id: r.session_id for r in run.results}
    parents = {r.session_id: r.parent_id for r in run.results if r.parent_id is not None}
    for name in roots:
        while roots[name] in parents:
            roots[name] = parents[roots[name]]
    for r in run.results:
        turns.setdefault(roots[r.session_id], []).append(r)
    found = [_task(name, results) for name, results in turns.items()]
    return sorted(found, key=lambda t: t.start_s)


def measure(
    run: Run, *, computed_tokens: int | None = None, new_tokens: int | None = None, cpu_s: float | None = None
) -> Measures:
    """Figures of a run. Failed turns count as failures and nowhere else."""
    done = [r for r in run.results if r.error is None]
    per_task = tasks(run)
    jct, stall = [t.jct_s for t in per_task], [t.stall_s for t in per_task]
    resumes = [r.first_token_s - r.start_s for r in done if r.index > 0 and r.first_token_s is not None]
    prompt = sum(r.prompt_tokens for r in done)
    output = sum(r.output_tokens for r in done)
    span = run.makespan_s or float("nan")
    return Measures(
        num_tasks=len(per_task),
        num_turns=len(run.results),
        num_failed=len(run.results) - len(done),
        makespan_s=run.makespan_s,
        tasks_per_hour=len(per_task) / span * 3600,
        requests_per_s=len(done) / span,
        output_tokens_per_s=output / span,
        jct_mean_s=mean(jct),
        jct_p50_s=quantile(jct, 0.5),
        jct_p95_s=quantile(jct, 0.95),
        stall_mean_s=mean(stall),
        stall_p50_s=quantile(stall, 0.5),
        stall_p95_s=quantile(stall, 0.95),
        stall_p99_s=quantile(stall, 0.99),
        gaps_mean_s=mean([t.gaps_s for t in per_task]),
        resume_ttft_p50_s=quantile(resumes, 0.5) if resumes else None,
        resume_ttft_p95_s=quantile(resumes, 0.95) if resumes else None,
        prompt_tokens=prompt,
        output_tokens=output,
        cached_share=sum(r.cached_tokens for r in done) / max(1, prompt),
        computed_tokens=computed_tokens,
        recomputed_tokens=(
            None if computed_tokens is None or new_tokens is None else max(0, computed_tokens - new_tokens)
        ),
        hit_bound=None if new_tokens is None else 1 - new_tokens / max(1, prompt),
        cpu_s=cpu_s,
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def quantile(values: Iterable[float], q: float) -> float:
    """Linear interpolation between order statistics; nan of nothing."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def _task(name: str, results: list[TurnResult]) -> Task:
    first, last = min(results, key=lambda r: r.start_s), max(results, key=lambda r: r.end_s)
    return Task(
        session_id=name,
        start_s=first.start_s,
        jct_s=last.end_s - first.start_s,
        gaps_s=last.tools_s - first.tools_s,
        num_turns=len(results),
        num_failed=sum(r.error is not None for r in results),
    )

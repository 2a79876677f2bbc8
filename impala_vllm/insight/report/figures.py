"""The figures of a ledger. Pure arithmetic over `Totals`; the words are those of docs/report.md."""

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from typing import Any

from impala_vllm.insight.report.totals import CAUSES, OPEN, PHASES, SOURCES, Totals

QUANTILES = (0.5, 0.9, 0.95, 0.99)
NUM_WORST = 10
NUM_BUCKETS = 48
"""Of the time line."""
_MIN_TRACES_TO_FIT = 8


@dataclass(frozen=True, slots=True)
class Spread:
    """A quantity over tasks, in seconds."""

    mean: float
    quantiles: tuple[float, ...]
    """At `QUANTILES`."""
    max: float


@dataclass(frozen=True, slots=True)
class Worst:
    """A trace that waited long."""

    trace: str
    jct_s: float
    stall_s: float
    gap_s: float
    turns: int
    largest: str
    """What most of its stall was."""
    again_tokens: int
    outcome: str


@dataclass(frozen=True, slots=True)
class Rates:
    """Device seconds a token, by least squares over traces; what a share of a step costs on average here."""

    prompt_s: float
    output_s: float


@dataclass(frozen=True, slots=True)
class Bucket:
    """A slice of the time line."""

    start: float
    tasks: int
    stall_mean_s: float | None
    """Of the tasks that ended in it."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What the report says. None: cannot be told from this ledger."""

    traces: int
    tasks: int
    """Traces without a parent that have ended."""
    open_traces: int
    turns: int
    failures: int
    start: float
    end: float
    wall_s: float
    """Time in which at least one engine was there."""
    gpu_hours: float
    """Time of each engine times its devices, idle time included: what is paid for."""
    busy_share: float
    tasks_per_hour: float
    jct: Spread | None
    stall: Spread | None
    time_s: dict[str, float]
    """Completion time of all tasks by what it was spent on: gap and the phases."""
    tail_s: dict[str, float]
    """The same of the twentieth that stalled longest."""
    tokens: dict[str, int]
    """Prompt tokens by source, and output; requests without a trace included."""
    unlinked_turns: int
    again: dict[str, int]
    rates: Rates | None
    device_s: dict[str, float] | None
    """Device seconds: prompts for the first time, prompts again by cause, outputs, idle. Needs `rates`."""
    outcomes: dict[str, int]
    """Of tasks."""
    reported: int
    succeeded: int
    worst: tuple[Worst, ...]
    timeline: tuple[Bucket, ...]
    jct_values: Sequence[float]
    """Sorted, for drawing."""
    stall_values: Sequence[float]

    @property
    def prompt_tokens(self) -> int:
        return sum(self.tokens[name] for name in SOURCES)

    @property
    def hit_ratio(self) -> float:
        """Share of prompt tokens found in HBM or below."""
        return 1 - self.tokens["computed"] / self.prompt_tokens if self.prompt_tokens else 0.0

    def money(self, price_per_gpu_hour: float) -> dict[str, float | None]:
        """In the price's currency."""
        cost = self.gpu_hours * price_per_gpu_hour
        wasted = None
        if self.device_s is not None:
            wasted = sum(self.device_s[cause] for cause in CAUSES) / 3600 * price_per_gpu_hour
        return {
            "price_per_gpu_hour": price_per_gpu_hour,
            "cost": cost,
            "tasks_per_dollar": self.tasks / cost if cost else None,
            "cost_per_task": cost / self.tasks if self.tasks else None,
            "successes_per_dollar": self.succeeded / cost if cost and self.reported else None,
            "cost_of_computing_again": wasted,
        }

    def document(self) -> dict[str, Any]:
        """Plain data for JSON."""
        found = asdict(self)
        for drawn in ("jct_values", "stall_values"):
            del found[drawn]
        for name in ("jct", "stall"):
            if found[name] is not None:
                found[name]["quantiles"] = {
                    f"p{q * 100:g}": v for q, v in zip(QUANTILES, found[name]["quantiles"], strict=True)
                }
        return found | {"prompt_tokens": self.prompt_tokens, "hit_ratio": self.hit_ratio}


def figures(totals: Totals) -> Figures:
    """Of at least one trace. O(n log n)."""
    totals.settle()
    c = totals.columns
    is_task = [bool(v) for v in c["is_task"]]
    num_tasks = sum(is_task)
    jct = [e - s for s, e in zip(c["start"], c["end"], strict=True)]
    stall = [sum(parts) for parts in zip(*(c[name] for name in PHASES), strict=True)]
    task_jct, task_stall = list(compress(jct, is_task)), list(compress(stall, is_task))
    runs = [run for run in totals.runs.values() if run.start < run.end]
    gpu_hours = sum((run.end - run.start) * run.gpus for run in runs) / 3600
    wall_s = _covered(sorted((run.start, run.end) for run in runs))
    busy_s = math.fsum(c["gpu_s"]) + sum(u.gpu_s for u in totals.unlinked.values())
    unlinked = totals.unlinked_tokens()
    tokens = {name: int(sum(c[name])) + getattr(unlinked, name) for name in (*SOURCES, "output")}
    again = {name: int(sum(c[name])) for name in CAUSES}
    rates = _rates(totals)
    outcomes = Counter(compress(totals.outcomes, is_task))
    reported = Counter(
        o for o, known, mine in zip(totals.outcomes, totals.reported, is_task, strict=True) if known and mine
    )
    bound = quantile(sorted(task_stall), 0.95) if task_stall else 0.0
    is_tail = [mine and value >= bound for mine, value in zip(is_task, stall, strict=True)]
    sorted_jct, sorted_stall = sorted(task_jct), sorted(task_stall)
    return Figures(
        traces=len(totals),
        tasks=num_tasks,
        open_traces=sum(outcome in OPEN for outcome in totals.outcomes),
        turns=int(sum(c["turns"])),
        failures=int(sum(c["failures"])),
        start=min(c["start"]),
        end=max(c["end"]),
        wall_s=wall_s,
        gpu_hours=gpu_hours,
        busy_share=busy_s / (gpu_hours * 3600) if gpu_hours else 0.0,
        tasks_per_hour=num_tasks / wall_s * 3600 if wall_s else 0.0,
        jct=_spread(sorted_jct),
        stall=_spread(sorted_stall),
        time_s=_spent(totals, is_task),
        tail_s=_spent(totals, is_tail),
        tokens=tokens,
        unlinked_turns=sum(u.turns for u in totals.unlinked.values()),
        again=again,
        rates=rates,
        device_s=_device(tokens, again, rates, busy_s, gpu_hours) if rates is not None else None,
        outcomes=dict(outcomes.most_common(12)),
        reported=sum(reported.values()),
        succeeded=reported["success"],
        worst=_worst(totals, jct, stall),
        timeline=_timeline(totals, is_task, stall),
        jct_values=sorted_jct,
        stall_values=sorted_stall,
    )


def quantile(ordered: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics of at least one value."""
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def _spread(ordered: Sequence[float]) -> Spread | None:
    if not ordered:
        return None
    return Spread(math.fsum(ordered) / len(ordered), tuple(quantile(ordered, q) for q in QUANTILES), ordered[-1])


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of sorted spans."""
    total, reach = 0.0, -math.inf
    for start, end in spans:
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total


def _spent(totals: Totals, chosen: Sequence[bool]) -> dict[str, float]:
    c = totals.columns
    return {"gap": math.fsum(compress(c["gap_s"], chosen))} | {n: math.fsum(compress(c[n], chosen)) for n in PHASES}


def _rates(totals: Totals) -> Rates | None:
    """Least squares of device seconds on computed and on output tokens. None where they cannot be told apart."""
    c = totals.columns
    pp = po = oo = pg = og = 0.0
    for computed, again, output, gpu_s in zip(c["computed"], c["preempted"], c["output"], c["gpu_s"], strict=True):
        prompt = computed + again
        pp += prompt * prompt
        po += prompt * output
        oo += output * output
        pg += prompt * gpu_s
        og += output * gpu_s
    determinant = pp * oo - po * po
    if len(totals) < _MIN_TRACES_TO_FIT or determinant <= 1e-6 * pp * oo:
        return None
    prompt_s, output_s = (pg * oo - og * po) / determinant, (og * pp - pg * po) / determinant
    return Rates(prompt_s, output_s) if prompt_s > 0 and output_s > 0 else None


def _device(
    tokens: dict[str, int], again: dict[str, int], rates: Rates, busy_s: float, gpu_hours: float
) -> dict[str, float]:
    spent = {name: again[name] * rates.prompt_s for name in CAUSES}
    first = max(0, tokens["computed"] - sum(again[name] for name in CAUSES if name != "preempted"))
    found = {"prompts": first * rates.prompt_s, **spent, "outputs": tokens["output"] * rates.output_s}
    scale = busy_s / total if (total := sum(found.values())) else 0.0
    return {name: value * scale for name, value in found.items()} | {"idle": max(0.0, gpu_hours * 3600 - busy_s)}


def _worst(totals: Totals, jct: Sequence[float], stall: Sequence[float]) -> tuple[Worst, ...]:
    c = totals.columns
    indexes = heapq.nlargest(NUM_WORST, range(len(totals)), key=stall.__getitem__)
    names = totals.names()
    return tuple(
        Worst(
            names[i],
            jct[i],
            stall[i],
            c["gap_s"][i],
            int(c["turns"][i]),
            max(PHASES, key=lambda name: c[name][i]),
            int(sum(c[name][i] for name in CAUSES)),
            totals.outcomes[i],
        )
        for i in indexes
        if stall[i] > 0
    )


def _timeline(totals: Totals, is_task: Sequence[bool], stall: Sequence[float]) -> tuple[Bucket, ...]:
    ends = list(compress(totals.columns["end"], is_task))
    if not ends:
        return ()
    first, last = min(totals.columns["start"]), max(ends)
    width = max(last - first, 1e-9) / NUM_BUCKETS
    counts, waits = [0] * NUM_BUCKETS, [0.0] * NUM_BUCKETS
    for end, wait in zip(ends, compress(stall, is_task), strict=True):
        bucket = min(NUM_BUCKETS - 1, int((end - first) / width))
        counts[bucket] += 1
        waits[bucket] += wait
    return tuple(
        Bucket(first + i * width, n, w / n if n else None) for i, (n, w) in enumerate(zip(counts, waits, strict=True))
    )

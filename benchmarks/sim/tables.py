"""What the study found, as lines, a table and records."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from benchmarks.record import Origin, Record
from benchmarks.sim.grid import Point
from benchmarks.sim.verdict import LEAST_HITS, LEAST_TASKS, MOST_MISSES, MOST_STALL, ByPolicy, Verdict
from impala_vllm.replay.measures import mean
from impala_vllm.sim.measures import Measures
from impala_vllm.sim.question import NEARLY

PATIENCE_S = 600.0
"""Of OpenAI's clients. impala's holds have a bound below it; those of rivals have none."""
STALLS = f"points with mean stall <= {MOST_STALL} of the best rival's"
TASKS = f"points with tasks an hour >= {LEAST_TASKS} of the best rival's"
WINS, PAYS = "points that impala wins or equals", "points that it wins or equals, paying for what it decides"
HITS = f"points with host and NVMe where hits are >= {LEAST_HITS} of an infinite cache's"
MISSES = f"points on HBM alone with misses <= {MOST_MISSES} of those of Belady's MIN"
WHOLE = "all axes"
"""What records of a study say that left none out."""


def named(v: Verdict) -> str:
    """The point, and its load where that is not the one asked for."""
    return str(v.point) if v.level >= NEARLY * v.point.level else f"{v.point} (in fact {v.level:.2g}x)"


def line(v: Verdict) -> str:
    """As soon as all runs of a point are there."""
    verdict = "" if v.wins else f"  <- not won{_patience(v)}"
    return f"{named(v)}: stall {mean(v.stall):.2f} of {v.best}, tasks {mean(v.tasks):.2f} of {v.busiest}{verdict}"


def show(verdicts: Sequence[Verdict], console: Console) -> None:
    """All of them, and how many keep each bar."""
    table = Table(title="impala / best rival, simulated")
    for heading in (
        "point",
        "best rival",
        "stall",
        "tasks/h",
        "paying",
        "stall / bound",
        "hits / bound",
        "misses / MIN",
    ):
        table.add_column(heading)
    table.add_column("longest holds s")
    table.add_column("")
    for v in verdicts:
        table.add_row(
            named(v),
            v.best,
            f"{mean(v.stall):.2f}",
            f"{mean(v.tasks):.3f}",
            "" if v.paying is None else f"{v.paying[0]:.2f}, {v.paying[1]:.3f}",
            f"{v.to_bound:.2f}",
            "" if v.hits is None else f"{v.hits:.3f}",
            "" if v.misses is None else f"{v.misses:.2f}",
            f"{v.held_s:,.0f} / {v.best_held_s:,.0f}",
            "" if v.wins else "[red]not won[/]",
        )
    console.print(table)
    for what, met in _counts(verdicts).items():
        if met:
            console.print(f"{what}: {sum(met)} of {len(met)}", highlight=False)


def records(
    origin: Origin, verdicts: Sequence[Verdict], found: Mapping[Point, ByPolicy], params: Mapping[str, object]
) -> list[Record]:
    """Bars over all points first, then two ratios a point with the figures behind them."""
    made: list[Record] = []
    for what, met in _counts(verdicts).items():
        if met:
            share, note = 100 * sum(met) / len(met), {**params, "met": f"{sum(met)} of {len(met)}"}
            values = [share] * len(met)
            made.append(origin.record("sim/study", "impala", note, what, "%", "higher", values, source="simulated"))
    for v in verdicts:
        measures = found[v.point]
        note = {
            **params,
            "load": f"{v.level:.3g}x",
            "best rival": v.best,
            "most tasks": v.busiest,
            "mean stall": f"{_mean(measures['impala'], 'stall_mean_s'):,.1f} s, {v.best} "
            f"{_mean(measures[v.best], 'stall_mean_s'):,.1f} s",
            "hits": f"{_mean(measures['impala'], 'hit_ratio'):.3f}, {v.best} "
            f"{_mean(measures[v.best], 'hit_ratio'):.3f}" + ("" if v.hits is None else f", {v.hits:.3f} of the bound"),
            "a turn is held at most": f"{v.held_s:,.0f} s by impala, {v.best_held_s:,.0f} s by the best rival",
            **({} if v.misses is None else {"misses": f"{v.misses:.3f} of those of Belady's MIN"}),
            **({} if v.paying is None else {"paying": f"stall {v.paying[0]:.3f}, tasks {v.paying[1]:.3f}"}),
            "": "impala wins or equals it" if v.wins else "**impala does not win**",
        }
        for metric, better, values in (
            ("stall / best rival's", "lower", v.stall),
            ("tasks an hour / best rival's", "higher", v.tasks),
        ):
            point = str(v.point)
            made.append(origin.record("sim/study", point, note, metric, "x", better, values, source="simulated"))
    return made


def _counts(verdicts: Sequence[Verdict]) -> dict[str, list[bool]]:
    """Is it met? By bar, of each point that it is asked of."""
    return {
        STALLS: [v.stalls_little for v in verdicts],
        TASKS: [v.ends_many for v in verdicts],
        WINS: [v.wins for v in verdicts],
        PAYS: [v.wins_paying for v in verdicts if v.wins_paying is not None],
        MISSES: [v.misses_little for v in verdicts if v.misses_little is not None],
        HITS: [v.finds_enough for v in verdicts if v.finds_enough is not None],
    }


def _patience(v: Verdict) -> str:
    return f" ({v.best} holds a turn for {v.best_held_s:,.0f} s)" if v.best_held_s > PATIENCE_S else ""


def _mean(found: Sequence[Measures], figure: str) -> float:
    return mean([asdict(m)[figure] for m in found])

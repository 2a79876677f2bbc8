"""`python -m benchmarks.sim.study`: every policy at every load, tier and link. Where does impala not win?

Simulated. A point is a workload, an oversubscription of HBM, tiers below it and their links; all policies serve the
same sessions there. `--quick` is a corner of it.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from msgspec import structs
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import record
from benchmarks.record import Record
from benchmarks.sim import heat, loads
from benchmarks.sim.loads import Logs
from impala_vllm.config import ConfigError
from impala_vllm.replay.measures import mean
from impala_vllm.sim import timing
from impala_vllm.sim.measures import Measures
from impala_vllm.sim.policies import KINDS, pick
from impala_vllm.sim.sessions import Workload
from impala_vllm.sim.simulation import Arrivals, Setup, run
from impala_vllm.workload import WorkloadError

LEVELS = (0.5, 1.0, 2.0, 4.0, 8.0)
QUICK_LEVELS = (1.0, 4.0)
TIERS = {"HBM": (0.0, 0.0), "host 1x": (1.0, 0.0), "host 4x": (4.0, 0.0), "host 1x, NVMe 8x": (1.0, 8.0)}
LINKS = {"GPU links": 1.0, "slow links": 1 / 3}
"""Rates, as a share of the timing's: host at some 12 and 4 times, NVMe at 1.5 and 0.5 times the rate of prefill."""
MOST_STALL, LEAST_TASKS = 1.02, 0.99
"""Of the best rival: within this impala wins, or is as good."""
PATIENCE_S = 600.0
"""Of OpenAI's clients. impala's holds have a bound below it; those of rivals have none."""
LEAST_STALL_S = 0.01
"""Stalls below it are alike."""


@dataclass(frozen=True, slots=True)
class Point:
    workload: str
    level: float
    tiers: str
    links: str

    def __str__(self) -> str:
        links = "" if self.tiers == "HBM" else f", {self.links}"
        return f"{self.workload} {self.level:g}x, {self.tiers}{links}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """impala at a point, means over seeds."""

    point: Point
    best: str
    """The rival with the least mean stall."""
    stall: Sequence[float]
    """impala's over the best rival's, seed by seed."""
    tasks: Sequence[float]
    """Tasks an hour, over those of whichever rival has most."""
    to_bound: float
    """Stall over the bound's that has least."""
    held_s: float
    best_held_s: float
    """Longest time that impala and the best rival kept a turn back: clients give up after `PATIENCE_S`."""

    @property
    def wins(self) -> bool:
        return mean(self.stall) <= MOST_STALL and mean(self.tasks) >= LEAST_TASKS


Found = dict[Point, dict[str, list[Measures]]]


@click.command()
@click.option("--traces", type=click.Path(path_type=Path), envvar="IMPALA_TRACES", required=True, help="Agents' log.")
@click.option("--requests", "singles", type=click.Path(path_type=Path), help="Log of single requests (mooncake).")
@click.option("--tasks", type=click.IntRange(min=3), default=32, show_default=True)
@click.option("--turns", type=click.IntRange(min=2), default=40, show_default=True, help="Of a session at most.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--timing", "name", default=timing.DEFAULT, show_default=True)
@click.option("--workload", "workloads", multiple=True, help="Only this, once or more.")
@click.option("--oversubscription", "levels", type=click.FloatRange(min=0.1), multiple=True, help="The same.")
@click.option("--policies", default="all", show_default=True, metavar="LIST|all", help="impala and a rival at least.")
@click.option("--quick", is_flag=True, help="1x and 4x unless said, GPU links, fewer tiers, one seed.")
@click.option("--html", type=click.Path(path_type=Path), help="Heat maps, as one page.")
@click.option("--no-record", is_flag=True, help="Do not add to benchmarks/results.")
def main(
    traces: Path,
    singles: Path | None,
    tasks: int,
    turns: int,
    seeds: int,
    name: str,
    workloads: tuple[str, ...],
    levels: tuple[float, ...],
    policies: str,
    quick: bool,
    html: Path | None,
    no_record: bool,
) -> None:
    """Compare every policy everywhere. Exit 1 where impala neither wins nor equals the best rival."""
    console = Console(stderr=True)
    tiers, links = list(TIERS), list(LINKS)
    if quick:
        seeds, tiers, links = 1, ["HBM", "host 1x", "host 1x, NVMe 8x"], links[:1]
    levels = levels or (QUICK_LEVELS if quick else LEVELS)
    try:
        kinds = _kinds(policies)
        engine, logs = timing.load(name), loads.read(traces, singles)
        if unknown := [w for w in workloads if w not in logs.names()]:
            raise ConfigError(f"--workload: {', '.join(unknown)} is none; choose from {', '.join(logs.names())}")
    except (WorkloadError, ValueError) as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(2)
    points = [
        Point(w, level, t, link)
        for w in workloads or logs.names()
        for level in levels
        for t in tiers
        for link in (links if t != "HBM" else links[:1])
    ]
    found = _run(points, kinds, logs, engine, (tasks, turns, seeds), console)
    verdicts = [judge(point, by_policy) for point, by_policy in found.items()]
    _show(verdicts, Console())
    if html is not None:
        html.write_text(heat.page(found, name), encoding="utf-8")
    if not no_record:
        params = {"tasks": tasks, "turns": turns, "timing": engine.describe(), "policies": ", ".join(kinds)}
        console.print(f"recorded in {record.append(_records(verdicts, params))}")
    sys.exit(0 if all(v.wins for v in verdicts) else 1)


def _kinds(names: str) -> list[str]:
    kinds = [kind.name for kind in pick(names)]
    if "impala" not in kinds or all(n == "impala" or KINDS[n].is_bound for n in kinds):
        raise ConfigError("--policies: a verdict takes impala and a rival of it; give both")
    return kinds


def judge(point: Point, by_policy: dict[str, list[Measures]]) -> Verdict:
    """impala against the best of its rivals, and against the best bound."""
    stalls = {n: mean([max(LEAST_STALL_S, m.stall_mean_s) for m in found]) for n, found in by_policy.items()}
    rivals = [n for n in by_policy if n != "impala" and not KINDS[n].is_bound]
    bounds = [stalls[n] for n in by_policy if KINDS[n].is_bound]
    best = min(rivals, key=stalls.__getitem__)
    busiest = max(rivals, key=lambda n: mean([m.tasks_per_hour for m in by_policy[n]]))
    ours = by_policy["impala"]
    stall = [
        max(LEAST_STALL_S, a.stall_mean_s) / max(LEAST_STALL_S, b.stall_mean_s)
        for a, b in zip(ours, by_policy[best], strict=True)
    ]
    tasks = [a.tasks_per_hour / b.tasks_per_hour for a, b in zip(ours, by_policy[busiest], strict=True)]
    to_bound = stalls["impala"] / min(bounds) if bounds else 1.0
    held_s, best_held_s = (max(m.max_hold_s for m in by_policy[n]) for n in ("impala", best))
    return Verdict(point, best, stall, tasks, to_bound, held_s, best_held_s)


def setup(load: Workload, engine: timing.Timing, point: Point) -> Setup:
    """HBM for the working set over the level, and the tiers for their share of it."""
    hbm = max(round(load.working_set_tokens() / point.level), load.longest_tokens() + 2 * load.block_size)
    host, nvme = TIERS[point.tiers]
    share = LINKS[point.links]
    rates = ("host_bytes_per_s", "nvme_read_bytes_per_s", "nvme_write_bytes_per_s")
    slowed = {n: share * rate for n in rates if (rate := getattr(engine, n)) is not None}
    slow = structs.replace(engine, **slowed)
    return Setup(slow, hbm, host_tokens=round(host * hbm), nvme_tokens=round(nvme * hbm), arrivals=Arrivals())


def _run(
    points: Sequence[Point],
    kinds: Sequence[str],
    logs: Logs,
    engine: timing.Timing,
    scale: tuple[int, int, int],
    console: Console,
) -> Found:
    tasks, turns, seeds = scale
    found: Found = {}
    made: dict[tuple[str, int], Workload] = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(points) * len(kinds) * seeds)
        for point in points:
            for seed in range(seeds):
                key = point.workload, seed
                if key not in made:
                    made[key] = logs.make(point.workload, tasks, turns, seed)
                for kind in kinds:
                    progress.update(task, description=f"{point}, seed {seed}: {kind}")
                    measures = run(made[key], setup(made[key], engine, point), KINDS[kind]).measures
                    found.setdefault(point, {}).setdefault(kind, []).append(measures)
                    progress.advance(task)
            console.print(_line(judge(point, found[point])), highlight=False)
    return found


def _line(v: Verdict) -> str:
    verdict = "" if v.wins else f"  <- not won{_patience(v)}"
    return f"{v.point}: stall {mean(v.stall):.2f} and tasks {mean(v.tasks):.2f} of {v.best}{verdict}"


def _patience(v: Verdict) -> str:
    return f" ({v.best} holds a turn for {v.best_held_s:,.0f} s)" if v.best_held_s > PATIENCE_S else ""


def _show(verdicts: Iterable[Verdict], console: Console) -> None:
    table = Table(
        "point", "best rival", "stall", "tasks/h", "stall / bound", "longest holds s", "",
        title="impala / best rival, simulated",
    )  # fmt: skip
    for v in verdicts:
        won = "" if v.wins else "[red]not won[/]"
        held = f"{v.held_s:,.0f} / {v.best_held_s:,.0f}"
        table.add_row(
            str(v.point), v.best, f"{mean(v.stall):.2f}", f"{mean(v.tasks):.3f}", f"{v.to_bound:.2f}", held, won
        )
    console.print(table)


def _records(verdicts: Iterable[Verdict], params: dict[str, object]) -> list[Record]:
    origin = record.origin()
    made: list[Record] = []
    for v in verdicts:
        held = f"{v.held_s:,.0f} s by impala, {v.best_held_s:,.0f} s by the best rival"
        note = {
            **params,
            "best rival": v.best,
            "a turn is held at most": held,
            "": "impala wins or equals it" if v.wins else "**impala does not win**",
        }
        for metric, better, values in (
            ("stall / best rival's", "lower", v.stall),
            ("tasks an hour / best rival's", "higher", v.tasks),
        ):
            point = str(v.point)
            made.append(origin.record("sim/study", point, note, metric, "x", better, values, source="simulated"))
    return made


if __name__ == "__main__":
    main()

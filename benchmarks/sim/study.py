"""`python -m benchmarks.sim.study`: every policy at every load, tier and link. Where does impala not win?

Simulated. All policies serve the same sessions at a point. Each run is on disk as soon as it is over (`--raw`), and the
same command goes on where it was stopped. `--quick` is a corner of it, `--full` all of it.
"""

import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import record
from benchmarks.sim import cells, grid, heat, loads, tables
from benchmarks.sim.cells import PAYING, Cell, Ran, Scale
from benchmarks.sim.grid import Point
from benchmarks.sim.raw import Raw
from benchmarks.sim.verdict import Verdict, judge
from impala_vllm.cli import out_file
from impala_vllm.config import ConfigError
from impala_vllm.replay.measures import mean
from impala_vllm.sim import timing
from impala_vllm.sim.measures import Measures
from impala_vllm.sim.policies import KINDS, pick
from impala_vllm.workload import WorkloadError

SEEDS = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """All of `points`, under all policies."""

    points: Sequence[Point]
    policies: Sequence[str]
    num_seeds: int

    def cells(self, *points: Point) -> list[Cell]:
        """What these take."""
        return cells.cells(points, self.policies, self.num_seeds)


@click.command()
@click.option("--traces", type=click.Path(path_type=Path), envvar="IMPALA_TRACES", required=True, help="Agents' log.")
@click.option("--requests", "singles", type=click.Path(path_type=Path), help="Log of requests (mooncake).")
@click.option("--tasks", type=click.IntRange(min=3), default=24, show_default=True)
@click.option("--turns", type=click.IntRange(min=2), default=30, show_default=True, help="Of a session at most.")
@click.option("--seeds", type=click.IntRange(min=1), help=f"Default: {SEEDS}.")
@click.option("--timing", "name", default=timing.DEFAULT, show_default=True)
@click.option("--workload", "workloads", multiple=True, help="Only this, once or more.")
@click.option("--oversubscription", "levels", type=click.FloatRange(min=0.1), multiple=True, help="The same.")
@click.option("--policies", default="all", show_default=True, metavar="LIST|all", help="impala and a rival at least.")
@click.option("--quick", "kind", flag_value="quick", help="1x and 4x unless said, GPU links, fewer tiers, one seed.")
@click.option("--full", "kind", flag_value="full", help="Every combination, which takes hours.")
@click.option("--processes", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--raw", type=click.Path(path_type=Path), metavar="FILE", help="Runs, as they come; goes on with FILE.")
@click.option("--html", type=click.Path(path_type=Path), help="Heat maps, as one page.")
@click.option("--no-record", is_flag=True, help="Do not add to benchmarks/results; without --raw, keep nothing.")
def main(
    traces: Path,
    singles: Path | None,
    tasks: int,
    turns: int,
    seeds: int | None,
    name: str,
    workloads: tuple[str, ...],
    levels: tuple[float, ...],
    policies: str,
    kind: str | None,
    processes: int,
    raw: Path | None,
    html: Path | None,
    no_record: bool,
) -> None:
    """Compare every policy everywhere. Exit 1 where impala neither wins nor equals the best rival."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # processes of the pool end with this one
    console = Console(stderr=True)
    kind = kind or "hour"
    scale = Scale(traces, singles, tasks, turns, name)
    origin = record.origin()
    try:
        kinds = _kinds(policies)
        engine = timing.load(name)
        known = loads.names(singles is not None)
        if unknown := [w for w in workloads if w not in known]:
            raise ConfigError(f"--workload: {', '.join(unknown)} is none; choose from {', '.join(known)}")
        if html is not None:
            out_file.check(html, [p for p in (traces, singles) if p is not None], "a log")
        for log in (traces, singles):
            if log is not None and not log.exists():
                raise ConfigError(f"{log}: no such file; give a log")
        points = grid.points(kind, workloads or known, levels)
        num_seeds = seeds or (1 if kind == "quick" else SEEDS)
        about = {"commit": origin.commit, "tasks": tasks, "turns": turns, "timing": name, **_sizes(traces, singles)}
        if raw is None and not no_record:
            raw = record.RESULTS / "study" / f"{origin.commit}.jsonl"
        kept = Raw(raw, about)
        ran = _run(Plan(points, kinds, num_seeds), kept, scale, processes, console)
    except (WorkloadError, ValueError) as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, BrokenProcessPool) as e:
        again = f"the same command goes on with {raw}" if raw is not None else "nothing was kept: give --raw FILE"
        is_asked = isinstance(e, KeyboardInterrupt)
        what = "stopped" if is_asked else "error: a process was killed, for want of memory perhaps"
        click.echo(f"\n{what}; {again}", err=True)
        sys.exit(130 if is_asked else 2)
    found = {point: _by_policy(point, kinds, ran) for point in points}
    verdicts = [_judge(point, kinds, ran) for point in points]
    tables.show(verdicts, Console())
    if html is not None:
        html.write_text(heat.page(found, name, {v.point: tables.named(v) for v in verdicts}), encoding="utf-8")
    if not no_record:
        is_whole = kind != "quick" and not (workloads or levels) and singles is not None and policies == "all"
        params: dict[str, object] = {
            "tasks": tasks, "turns": turns, "timing": engine.describe(), "policies": ", ".join(kinds), "grid": kind,
            "covers": tables.WHOLE if is_whole and num_seeds >= SEEDS else "a part",
        }  # fmt: skip
        console.print(f"recorded in {record.append(tables.records(origin, verdicts, found, params))}")
    sys.exit(0 if all(v.wins for v in verdicts) else 1)


def _kinds(names: str) -> list[str]:
    kinds = [kind.name for kind in pick(names)]
    if "impala" not in kinds or all(n == "impala" or KINDS[n].is_bound for n in kinds):
        raise ConfigError("--policies: a verdict takes impala and a rival of it; give both")
    return [*kinds, PAYING] if names.strip() == "all" else kinds


def _sizes(*logs: Path | None) -> dict[str, str]:
    names = ("traces", "requests")
    return {n: f"{p.name}, {p.stat().st_size} bytes" for n, p in zip(names, logs, strict=True) if p is not None}


def _run(plan: Plan, kept: Raw, scale: Scale, processes: int, console: Console) -> dict[Cell, Ran]:
    """What the plan takes and is not there yet; says what each point came to."""
    todo = plan.cells(*plan.points)
    left = [cell for cell in todo if cell not in kept.found]
    if len(left) < len(todo):
        console.print(f"{len(todo) - len(left)} of {len(todo)} runs are there already")
    lacking = {point: {c for c in plan.cells(point) if c not in kept.found} for point in plan.points}
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    with (
        cells.running(left, scale, min(processes, max(1, len(left)))) as results,
        Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True,
            disable=not console.is_terminal,
        ) as progress,
    ):  # fmt: skip
        task = progress.add_task("", total=len(todo), completed=len(todo) - len(left))
        for ran in results:
            kept.add(ran)
            progress.update(task, description=str(ran.cell), advance=1)
            for point, cells_left in lacking.items():
                if ran.cell in cells_left:
                    cells_left.remove(ran.cell)
                    if not cells_left:
                        mine = {c: kept.found[c] for c in plan.cells(point)}
                        console.print(tables.line(_judge(point, plan.policies, mine)), highlight=False)
    return {cell: kept.found[cell] for cell in todo}


def _by_policy(point: Point, policies: Sequence[str], ran: Mapping[Cell, Ran]) -> dict[str, list[Measures]]:
    """In the order of policies and seeds, whatever order they came in."""
    return {policy: [r.measures for r in _over_seeds(point, policy, ran)] for policy in policies}


def _judge(point: Point, policies: Sequence[str], ran: Mapping[Cell, Ran]) -> Verdict:
    ours = _over_seeds(point, "impala", ran)
    counted = [(r.missed, r.fewest) for r in ours if r.missed is not None and r.fewest is not None]
    misses = (sum(m for m, _ in counted), sum(f for _, f in counted)) if counted else None
    return judge(point, _by_policy(point, policies, ran), mean([r.level for r in ours]), misses)


def _over_seeds(point: Point, policy: str, ran: Mapping[Cell, Ran]) -> list[Ran]:
    found: list[Ran] = []
    while (one := ran.get(cells.cell(point, policy, len(found)))) is not None:
        found.append(one)
    return found


if __name__ == "__main__":
    main()

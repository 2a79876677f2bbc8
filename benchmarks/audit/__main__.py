"""`python -m benchmarks.audit --traces FILE_OR_DIR`: break the prefixes of recorded sessions, see what is named.

Where to get the logs: docs/audit.md.
"""

import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import record
from benchmarks.audit import trial
from benchmarks.audit.mutations import MUTATIONS
from benchmarks.audit.sessions import Session, load
from benchmarks.audit.trial import Tally
from impala_vllm.replay.measures import quantile
from impala_vllm.workload import WorkloadError

_SHOWN = 12
_SPEEDS: dict[str, Callable[[list[Session], int], list[Session]]] = {
    "with session ids": lambda sessions, seed: sessions,
    "sessions recognised": lambda sessions, seed: trial.mingled(sessions),
    "an id at the head of every prompt": lambda sessions, seed: trial.change("UUID at the head", sessions, seed)[0],
}


@dataclass(frozen=True, slots=True)
class Told:
    """What an audit said of sessions as they are and with each kind of change."""

    untouched: Tally
    tallies: dict[str, Tally]

    @property
    def total(self) -> Tally:
        """Over all changes."""
        return sum(self.tallies.values(), Tally())


@click.command()
@click.option("--traces", type=click.Path(path_type=Path), required=True, help="Messages log, or directory of them.")
@click.option("--sessions", type=click.IntRange(min=1), default=50, show_default=True, help="At most so many, evenly.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the changes.")
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, help="Repetitions of the timing.")
@click.option("--name", help="What the records call the log; its file name otherwise.")
@click.option("--no-record", is_flag=True, help="Do not add to benchmarks/results.")
def main(**options: Any) -> None:
    """Share of seeded changes that an audit names rightly, false alarms, and speed."""
    try:
        _run(**options)
    except (WorkloadError, ValueError) as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("stopped; nothing was recorded", err=True)
        sys.exit(130)


def _run(traces: Path, sessions: int, seed: int, repeat: int, name: str | None, no_record: bool) -> None:
    label = name or traces.name.partition(".")[0]
    if not re.fullmatch(r"[\w.-]+", label):
        raise ValueError(f"--name {label!r}: give one of letters, digits, dots and hyphens")
    everything = load(traces)
    taken = everything[:: max(len(everything) // sessions, 1)][:sessions]
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory() as place,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        folder = Path(place)
        task = progress.add_task("", total=2 * len(MUTATIONS) + len(_SPEEDS))

        def told(with_ids: bool) -> Told:
            tallies: dict[str, Tally] = {}
            for kind in MUTATIONS:
                progress.update(task, description=kind, advance=1)
                tallies[kind] = trial.changed(kind, taken, seed, folder, with_ids)
            return Told(trial.clean(everything, folder, with_ids), tallies)

        named, recognised = told(True), told(False)
        speeds: dict[str, list[float]] = {}
        for variant, arrange in _SPEEDS.items():
            progress.update(task, description=variant, advance=1)
            kept = arrange(everything, seed)
            speeds[variant] = [trial.speed(kept, folder) for _ in range(repeat)]
    _show(named, speeds)
    _show(recognised, {})
    if not no_record:
        params = {
            "log": traces.name,
            "sessions": len(everything),
            "turns": named.untouched.clean,
            "sessions changed": len(taken),
            "kinds of change": sum(t.sessions > 0 for t in named.tallies.values()),
        }
        where = record.append(_records(f"audit/{label}", params, seed, named, recognised, speeds))
        console.print(f"recorded in {where}; `python -m benchmarks.report` writes RESULTS.md", soft_wrap=True)


def _records(
    question: str,
    params: dict[str, Any],
    seed: int,
    named: Told,
    recognised: Told,
    speeds: dict[str, list[float]],
) -> list[record.Record]:
    origin = record.origin()
    made: list[record.Record] = []

    def add(metric: str, unit: str, better: str, values: list[float], **extra: Any) -> None:
        made.append(origin.record(question, "audit", {**params, **extra}, metric, unit, better, values, seed=seed))

    for told, which in ((named, ""), (recognised, ", sessions recognised")):
        total, untouched = told.total, told.untouched
        worst = min(t.named / t.expected for t in told.tallies.values() if t.expected)
        add(f"changes named rightly{which}", "", "higher", [total.named / total.expected], of=f"{total.expected}")
        add(f"worst kind of change{which}", "", "higher", [worst])
        add(f"false alarms, changed{which}", "", "lower", [total.alarms / max(total.clean, 1)], of=f"{total.clean}")
        add(
            f"false alarms, unchanged{which}",
            "",
            "lower",
            [untouched.alarms / untouched.clean],
            of=f"{untouched.clean}",
        )
    for variant, values in speeds.items():
        add(f"speed, {variant}", "MB/s", "higher", values)
    for kind, tally in named.tallies.items():
        if tally.expected:
            add(f"named: {kind}", "", "higher", [tally.named / tally.expected], of=f"{tally.expected}")
    return made


def _show(told: Told, speeds: dict[str, list[float]]) -> None:
    console = Console()
    table = Table("change", *("sessions", "named", "of", "false alarms", "of"))
    for kind, t in {**told.tallies, "all": told.total, "none": told.untouched}.items():
        table.add_row(kind, *map(str, (t.sessions, t.named, t.expected, t.alarms, t.clean)))
    console.print(table)
    for variant, values in speeds.items():
        console.print(f"{variant}: {quantile(values, 0.5):.1f} MB/s of one core")
    for tally in (told.untouched, *told.tallies.values()):
        for line in tally.mistaken[:_SHOWN]:
            console.print(line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()

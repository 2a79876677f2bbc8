"""`python -m benchmarks.audit --traces FILE_OR_DIR`: break the prefixes of recorded sessions, see what is named.

Where to get the logs: docs/audit.md.
"""

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import record
from benchmarks.audit import trial
from benchmarks.audit.mutations import MUTATIONS
from benchmarks.audit.sessions import load
from benchmarks.audit.trial import Tally
from impala_vllm.replay.measures import quantile
from impala_vllm.workload import WorkloadError

_SHOWN = 12


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
        task = progress.add_task("unchanged", total=len(MUTATIONS) + 3)
        untouched = trial.clean(everything, folder)
        tallies: dict[str, Tally] = {}
        for kind in MUTATIONS:
            progress.update(task, description=kind, advance=1)
            tallies[kind] = trial.changed(kind, taken, seed, folder)
        speeds: dict[str, list[float]] = {}
        for variant, with_ids in (("with session ids", True), ("sessions recognised", False)):
            progress.update(task, description=variant, advance=1)
            speeds[variant] = [trial.speed(everything, folder, with_ids) for _ in range(repeat)]
    _show(untouched, tallies, speeds)
    if not no_record:
        params = {
            "log": traces.name,
            "sessions": len(everything),
            "turns": untouched.clean,
            "sessions changed": len(taken),
            "kinds of change": sum(t.sessions > 0 for t in tallies.values()),
        }
        where = record.append(_records(f"audit/{label}", params, seed, untouched, tallies, speeds))
        console.print(f"recorded in {where}; `python -m benchmarks.report` writes RESULTS.md", soft_wrap=True)


def _records(
    question: str,
    params: dict[str, Any],
    seed: int,
    untouched: Tally,
    tallies: dict[str, Tally],
    speeds: dict[str, list[float]],
) -> list[record.Record]:
    origin = record.origin()
    made: list[record.Record] = []

    def add(metric: str, unit: str, better: str, values: list[float], **extra: Any) -> None:
        made.append(
            record.Record(
                question=question,
                variant="audit",
                params={**params, **extra},
                metric=metric,
                unit=unit,
                better=better,
                n=len(values),
                p20=quantile(values, 0.2),
                p50=quantile(values, 0.5),
                p80=quantile(values, 0.8),
                source="measured",
                seed=seed,
                commit=origin.commit,
                versions=origin.versions,
                machine=origin.machine,
                command=origin.command,
            )
        )

    total = sum(tallies.values(), Tally())
    add("changes named rightly", "", "higher", [total.named / total.expected], of=f"{total.expected}")
    add("worst kind of change", "", "higher", [min(t.named / t.expected for t in tallies.values() if t.expected)])
    add("false alarms, changed sessions", "", "lower", [total.alarms / max(total.clean, 1)], of=f"{total.clean}")
    add("false alarms, unchanged", "", "lower", [untouched.alarms / untouched.clean], of=f"{untouched.clean}")
    for variant, values in speeds.items():
        add(f"speed, {variant}", "MB/s", "higher", values)
    for kind, tally in tallies.items():
        if tally.expected:
            add(f"named: {kind}", "", "higher", [tally.named / tally.expected], of=f"{tally.expected}")
    return made


def _show(untouched: Tally, tallies: dict[str, Tally], speeds: dict[str, list[float]]) -> None:
    console = Console()
    table = Table("change", *("sessions", "named", "of", "false alarms", "of"))
    for kind, t in {**tallies, "all": sum(tallies.values(), Tally()), "none": untouched}.items():
        table.add_row(kind, *map(str, (t.sessions, t.named, t.expected, t.alarms, t.clean)))
    console.print(table)
    for variant, values in speeds.items():
        console.print(f"{variant}: {quantile(values, 0.5):.1f} MB/s of one core")
    for tally in (untouched, *tallies.values()):
        for line in tally.mistaken[:_SHOWN]:
            console.print(line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()

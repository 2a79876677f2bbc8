"""`python -m benchmarks.io DIRECTORY`: bandwidth and CPU time of io_uring, of the thread pool and of fio.

All on one file in DIRECTORY, turn by turn in an order drawn anew for each repetition, so that a disk whose speed drifts
is fair to all. fio is left out, and said to be, where it is not installed.
"""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import record
from benchmarks.io.load import Load, Rate, make_file, run_fio, run_threads, run_uring
from benchmarks.record import Origin, Record

POOL_THREADS = 8
"""What `open_block_io` gives the thread pool."""
OURS = ("io_uring", "io_uring, registered")
"""The arms that are set against the others; the second is what the NVMe tier runs."""
CEILING = 4
"""So many times the depth: what the disk gives to whoever asks for more at once."""


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--sizes", default="64,256", show_default=True, help="KiB a block.")
@click.option("--depth", type=click.IntRange(min=1), default=16, show_default=True, help="Ops at once.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Of each run.")
@click.option("--repetitions", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--file-mib", type=click.IntRange(min=16), default=1024, show_default=True)
@click.option("--disk", metavar="WORDS", help="What kind of disk it is, for the record.")
@click.option("--no-record", is_flag=True, help="Do not add to benchmarks/results.")
def main(**options: Any) -> None:
    """How fast does each engine move blocks, and at what CPU time?"""
    try:
        _run(**options)
    except (OSError, ValueError, subprocess.CalledProcessError) as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("stopped; nothing was recorded", err=True)
        sys.exit(130)


def _run(
    directory: Path,
    sizes: str,
    depth: int,
    seconds: float,
    repetitions: int,
    file_mib: int,
    disk: str | None,
    no_record: bool,
) -> None:
    console = Console(stderr=True)
    arms = _arms(depth)
    if "fio" not in arms:
        console.print("no fio here (`apt-get install fio`): left out")
    about: dict[str, Any] = {"file MiB": file_mib, "load average before": f"{os.getloadavg()[0]:.0f}"}
    if disk:
        about["disk"] = disk
    loads = [Load(is_write, kib << 10, depth, seconds) for kib in _sizes(sizes) for is_write in (False, True)]
    made: list[Record] = []
    origin = record.origin()
    with (
        tempfile.NamedTemporaryFile(dir=directory) as scratch,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        path = Path(scratch.name)
        make_file(path, file_mib << 20)
        task = progress.add_task("", total=len(loads) * repetitions * len(arms))
        for load in loads:
            rates: dict[str, list[Rate]] = {name: [] for name in arms}
            for repetition in range(repetitions):
                for name in Random(repetition).sample(list(arms), len(arms)):
                    progress.update(task, description=f"{_name(load)}: {name}")
                    rates[name].append(arms[name](path, load))
                    progress.advance(task)
            made += records(load, about, rates, origin)
    _show(made, Console())
    if not no_record:
        console.print(f"recorded in {record.append(made)}; `python -m benchmarks.report` writes RESULTS.md")


def records(load: Load, about: dict[str, Any], rates: dict[str, list[Rate]], origin: Origin) -> list[Record]:
    """Of one load: each arm's rates, and the ratio to it that io_uring had in the same repetition, both ways."""
    made: list[Record] = []
    params: dict[str, Any] = {**about, "ops at once": load.depth, "seconds a run": load.seconds}

    def add(variant: str, metric: str, unit: str, better: str, values: list[float]) -> None:
        name = f"{_name(load)}: {variant}"
        made.append(origin.record("micro/block-io-load", name, params, metric, unit, better, values))

    for name, found in rates.items():
        add(name, "bandwidth", "MB/s", "higher", [rate.bytes_per_s / 1e6 for rate in found])
        add(name, "cpu_s_per_gb", "s", "lower", [rate.cpu_s_per_gb for rate in found])
    for ours, name in itertools.product(OURS, rates):
        if ours in rates and name not in OURS:
            pairs = zip(rates[ours], rates[name], strict=True)
            add(f"{ours} over {name}", "bandwidth", "", "higher", [u.bytes_per_s / o.bytes_per_s for u, o in pairs])
    return made


def _arms(depth: int) -> dict[str, Callable[[Path, Load], Rate]]:
    def threads(num: int) -> Callable[[Path, Load], Rate]:
        return lambda path, load: run_threads(path, load, num)

    arms: dict[str, Callable[[Path, Load], Rate]] = {
        "io_uring": lambda path, load: run_uring(path, load, is_registered=False),
        "io_uring, registered": lambda path, load: run_uring(path, load, is_registered=True),
        **{f"{num} threads": threads(num) for num in sorted({min(POOL_THREADS, depth), depth})},
    }
    if shutil.which("fio"):
        arms["fio"] = run_fio
        arms["fio, registered"] = lambda path, load: run_fio(path, load, is_registered=True)
        arms[f"fio, {CEILING * depth} at once"] = lambda path, load: run_fio(path, replace(load, depth=CEILING * depth))
    return arms


def _sizes(text: str) -> list[int]:
    sizes = text.split(",")
    if not all(size.isdecimal() and int(size) > 0 and int(size) % 4 == 0 for size in sizes):
        raise ValueError(f"--sizes {text}: give multiples of 4 with commas between, such as 64,256")
    return [int(size) for size in sizes]


def _name(load: Load) -> str:
    return f"{'write' if load.is_write else 'read'} {load.block_bytes // 1024} KiB"


def _show(made: list[Record], console: Console) -> None:
    table = Table("variant", "metric", "p50", "p20-p80")
    for r in made:
        table.add_row(r.variant, r.metric, f"{r.p50:.4g} {r.unit}", f"{r.p20:.4g}-{r.p80:.4g}")
    console.print(table)


if __name__ == "__main__":
    main()

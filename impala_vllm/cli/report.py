"""`impala report`: what a ledger says about tasks, money, waiting, and what would change it."""

import json
import math
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from impala_vllm.cli import out_file
from impala_vllm.cli.printable import printable
from impala_vllm.config import ConfigError
from impala_vllm.insight import templates
from impala_vllm.insight.ledger.read import Reading, neighbours, read
from impala_vllm.insight.report import Advice, Figures, Totals, advise, figures, prices, text
from impala_vllm.insight.report.page import Page, Simulated
from impala_vllm.sim import counterfactual, timing
from impala_vllm.sim.counterfactual import Counterfactual, Impossible

MAX_SERVERS_SHOWN = 12


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--price-per-gpu-hour", "price", type=click.FloatRange(min=0), metavar="P", help="What a device costs: adds money."
)
@click.option(
    "--prices",
    "table",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The same for several kinds of device: YAML lines of NAME: PRICE.",
)
@click.option("--html", "html_out", type=click.Path(path_type=Path), metavar="OUT", help="Write a page, too.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON instead of tables.")
@click.option("--no-simulation", is_flag=True, help="Leave out what stock vLLM and others would have done.")
@click.option(
    "--timing",
    "timing_name",
    default=timing.DEFAULT,
    show_default=True,
    metavar="FILE",
    help=f"How long simulated steps take: a YAML file, or one of {', '.join(timing.names())}.",
)
def report(
    file: Path,
    price: float | None,
    table: Path | None,
    html_out: Path | None,
    as_json: bool,
    no_simulation: bool,
    timing_name: str,
) -> None:
    """Say what the traces in FILE, a ledger with its rotated and live parts, took, and what they waited for."""
    if price is not None and not math.isfinite(price):
        raise click.BadParameter(f"{price} is no price", param_hint="'--price-per-gpu-hour'")
    if price is not None and table is not None:
        raise click.UsageError("--price-per-gpu-hour and --prices exclude one another: take one")
    priced = prices.load(table) if table is not None else None
    engine = timing.load(timing_name)
    if html_out is not None:
        templates.check("--html")
        out_file.check(html_out, neighbours(file), "the ledger")
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        totals, reading = _gather(file, progress)
        price = priced.mean(totals.runs.values()) if priced is not None else price
        found = figures(totals)
        simulated = "left out as asked for" if no_simulation else _simulate(totals, engine, progress)
    headers = [run.header for run in totals.runs.values() if run.header is not None]
    modes = {header.mode for header in headers}
    advice = advise(found, next(iter(modes)) if len(modes) == 1 else None)
    if html_out is not None:
        page = Page(f"Ledger {file.name}", found, advice, reading, _shown(simulated), price, _servers(totals))
        out_file.write(html_out, page.render())
    if as_json:
        click.echo(json.dumps(_document(found, advice, reading, simulated, price), indent=2))
    else:
        _print(found, advice, reading, _shown(simulated), price, Console())


def _gather(file: Path, progress: Progress) -> tuple[Totals, Reading]:
    """Read all of it. Raises ConfigError where nothing in it is usable."""
    totals, reading = Totals(), Reading()
    size = sum(part.stat().st_size for part in neighbours(file))
    task = progress.add_task(f"reading {file.name}", total=size)
    try:
        for line in read(file, reading, lambda num_bytes: progress.advance(task, num_bytes)):
            totals.add(line)
    except OSError as e:
        raise ConfigError(f"{file}: cannot read it ({e.strerror}); give a file written by --impala-ledger") from e
    progress.remove_task(task)
    if not len(totals):
        problem = f"; {reading.first_problem}" if reading.first_problem else ""
        raise ConfigError(
            f"{file}: no trace in it ({reading.lines:,} lines, {reading.corrupt:,} corrupt, {reading.newer:,} of a "
            f"newer version{problem}); give a file written by --impala-ledger"
        )
    return totals, reading


def _simulate(totals: Totals, engine: timing.Timing, progress: Progress) -> Counterfactual | str:
    headers = {name: run.header for name, run in totals.runs.items() if run.header is not None}
    task = progress.add_task("simulating", total=None)
    try:
        return counterfactual.simulate(totals.whole(), headers, engine, lambda _: progress.advance(task))
    except Impossible as e:
        return str(e)
    finally:
        progress.remove_task(task)


def _shown(simulated: Counterfactual | str) -> Simulated:
    if isinstance(simulated, str):
        return Simulated(f"Not simulated: {simulated}.")
    rows = simulated.rows()
    answer = f"{simulated.answer} Simulated on the newest {simulated.num_traces:,} traces that have their rows."
    return Simulated(
        answer,
        tuple(column.heading for column in rows[0][1]),
        tuple((name, tuple(column.cell for column in columns)) for name, columns in rows),
        simulated.question.assumptions,
    )


def _document(
    found: Figures, advice: list[Advice], reading: Reading, simulated: Counterfactual | str, price: float | None
) -> dict[str, Any]:
    return {
        **found.document(),
        "money": found.money(price) if price is not None else None,
        "advice": [a._asdict() for a in advice],
        "counterfactual": {"simulated": False, "reason": simulated}
        if isinstance(simulated, str)
        else simulated.document(),
        "reading": {
            "files": [str(path) for path in reading.files],
            "lines": reading.lines,
            "corrupt": reading.corrupt,
            "newer": reading.newer,
            "first_problem": reading.first_problem,
        },
    }


def _print(
    found: Figures, advice: list[Advice], reading: Reading, simulated: Simulated, price: float | None, console: Console
) -> None:
    _rows(console, "Tasks", text.headline(found, price))
    if spreads := text.spreads(found):
        table = Table("", title="How long tasks took", title_justify="left")
        for heading in text.SPREAD_HEADINGS:
            table.add_column(heading, justify="right", no_wrap=True)
        for name, cells in spreads:
            table.add_row(name, *cells)
        console.print(table)
        table = Table("", "", title="Where the time went", title_justify="left")
        for heading in ("all tasks", "longest stalls"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, meaning, whole, tail in text.time(found):
            table.add_row("tools" if name == "gap" else name, meaning, whole, tail)
        console.print(table)
    _rows(console, "Tokens", text.tokens(found))
    if device := text.device(found):
        _rows(console, "What was paid for (estimated)", device)
    _worst(console, found)
    if simulated.rows:
        table = Table("", title="Against stock vLLM: simulated, not measured", title_justify="left")
        for heading in simulated.headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for name, cells in simulated.rows:
            table.add_row(name, *cells)
        console.print(table)
    console.print(Text(printable(simulated.answer)))
    if simulated.assumptions:
        console.print("Assumed:", highlight=False)
    for line in simulated.assumptions:
        console.print(Text(f"- {printable(line)}"))
    for a in advice:
        console.print(Text(f"- {a.symptom} ({a.size}): {a.remedy}"))
    if reading.corrupt or reading.newer or reading.first_problem:
        console.print(
            Text(
                f"Of {reading.lines:,} lines {reading.corrupt:,} could not be read and {reading.newer:,} are of a "
                f"newer version; the first problem: {printable(reading.first_problem or '')}"
            )
        )


def _rows(console: Console, title: str, rows: list[text.Row]) -> None:
    table = Table("", "", "", title=title, title_justify="left", show_header=False)
    table.columns[1].justify = "right"
    table.columns[1].no_wrap = True
    for row in rows:
        table.add_row(row.name, row.cell, row.meaning)
    console.print(table)


def _worst(console: Console, found: Figures) -> None:
    if not found.worst:
        return
    table = Table(title="Longest stalls", title_justify="left")
    table.add_column("trace", no_wrap=True)
    for heading in ("stall", "mostly", "done in", "turns", "again", "outcome"):
        table.add_column(heading, justify="left" if heading in ("mostly", "outcome") else "right", no_wrap=True)
    for w in found.worst[:5]:
        table.add_row(
            Text(printable(w.trace)),
            text.seconds(w.stall_s),
            w.largest,
            text.seconds(w.jct_s),
            str(w.turns),
            f"{w.again_tokens:,}",
            Text(printable(w.outcome)),
        )
    console.print(table)


def _servers(totals: Totals) -> list[str]:
    named = [(name, run) for name, run in totals.runs.items() if run.traces]
    lines = [
        f"server {name}: {run.traces:,} traces, mode {run.header.mode}, {run.gpus} device(s), HBM for "
        f"{run.header.hbm:,} tokens"
        if run.header is not None
        else f"server {name}: {run.traces:,} traces, its header is gone"
        for name, run in named[-MAX_SERVERS_SHOWN:]
    ]
    return [*lines, f"and {len(named) - len(lines):,} servers before them"] if len(named) > len(lines) else lines

"""`impala simulate`: what a log would have cost on other machines and under other policies. No GPU needed."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from impala_vllm.cli import out_file
from impala_vllm.insight import templates
from impala_vllm.sim import page, report, timing
from impala_vllm.sim.chrome_trace import ChromeTrace
from impala_vllm.sim.client import Served
from impala_vllm.sim.fewest import fewest as find_fewest
from impala_vllm.sim.policies import KINDS, Kind, pick
from impala_vllm.sim.question import Asked, Question, ask
from impala_vllm.sim.routers import DEFAULT as DEFAULT_ROUTER
from impala_vllm.sim.routers import ROUTERS
from impala_vllm.sim.simulation import Outcome, run
from impala_vllm.workload import Format, load

DEFAULT_POLICIES = "stock,impala,unbounded"


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice([f.value for f in Format]), default="auto", show_default=True)
@click.option(
    "--policies",
    "names",
    default=DEFAULT_POLICIES,
    show_default=True,
    metavar="LIST|all",
    help=f"Comma-separated, of {', '.join(KINDS)}.",
)
@click.option("--replicas", type=click.IntRange(1, 100_000), default=1, show_default=True, help="Servers alike.")
@click.option(
    "--router",
    type=click.Choice(list(ROUTERS)),
    default=DEFAULT_ROUTER,
    show_default=True,
    help="What chooses among replicas, whatever the policy.",
)
@click.option("--fewest", is_flag=True, help="Also find with how few replicas others do what stock does with all.")
@click.option("--hbm-tokens", type=click.IntRange(min=1), help="KV room of each replica. Default: the timing's.")
@click.option("--host-tokens", type=click.IntRange(min=0), default=0, help="KV room in host DRAM of each replica.")
@click.option("--nvme-tokens", type=click.IntRange(min=0), default=0, help="KV room on NVMe of each replica.")
@click.option("--sessions", type=click.IntRange(min=1), help="So many tasks of the log, picked by the seed.")
@click.option(
    "--load",
    "level",
    type=click.FloatRange(min=0, min_open=True),
    help="Working set of the live sessions over HBM. Sets HBM, or with --hbm-tokens how many sessions are live.",
)
@click.option(
    "--timing",
    "timing_name",
    default=timing.DEFAULT,
    show_default=True,
    metavar="FILE",
    help=f"How long steps take: a YAML file, or one of {', '.join(timing.names())}.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the choice of sessions.")
@click.option("--json", "json_out", type=click.Path(path_type=Path), help="Write the figures; - for standard output.")
@click.option("--html", "html_out", type=click.Path(path_type=Path), metavar="PAGE", help="Write the answer as a page.")
@click.option("--chrome-trace", "trace_out", type=click.Path(path_type=Path), help="Write every step and turn.")
def simulate(
    file: Path,
    form: str,
    names: str,
    replicas: int,
    router: str,
    fewest: bool,
    hbm_tokens: int | None,
    host_tokens: int,
    nvme_tokens: int,
    sessions: int | None,
    level: float | None,
    timing_name: str,
    seed: int,
    json_out: Path | None,
    html_out: Path | None,
    trace_out: Path | None,
) -> None:
    """Serve FILE, a recorded log, in virtual time under several policies. Figures are simulated, not measured."""
    if level is not None and not math.isfinite(level):
        raise click.BadParameter(f"{level} is no load", param_hint="'--load'")
    kinds = pick(names)
    if fewest and (replicas == 1 or "stock" not in {kind.name for kind in kinds}):
        raise click.UsageError("--fewest compares with stock on --replicas: give two or more, and stock in --policies")
    engine = timing.load(timing_name)
    if html_out is not None:
        templates.check("--html")
    outs = [out for out in (json_out, html_out, trace_out) if out is not None]
    if len({out.absolute() for out in outs}) < len(outs):
        raise click.UsageError("--json, --html and --chrome-trace would overwrite each other: give each its own file")
    for out in outs:
        if out != Path("-"):
            out_file.check(out, [file], "the log")
    console = Console(stderr=True)
    trace = ChromeTrace() if trace_out is not None else None
    with Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        reading = progress.add_task(f"reading {file.name}", total=None)
        asked = Asked(engine, replicas, host_tokens, nvme_tokens, hbm_tokens, sessions, level, seed, router)
        question = ask(load(file, form), asked)
        progress.remove_task(reading)
        outcomes = {kind.name: _run(question, kind, progress, trace) for kind in kinds}
        found = _fewest(question, kinds, outcomes, progress) if fewest else {}
    text = json.dumps(report.document(question, seed, outcomes, found), indent=2) + "\n"
    if json_out is not None:
        _write(json_out, text)
    if html_out is not None:
        _write(html_out, page.render(file.name, question, seed, outcomes, found))
    if trace_out is not None and trace is not None:
        _write(trace_out, trace.text())
    if Path("-") not in (json_out, html_out, trace_out):
        _print(question, outcomes, found)


def _run(question: Question, kind: Kind, progress: Progress, trace: ChromeTrace | None) -> Outcome:
    task = progress.add_task(kind.name, total=question.workload.num_turns())
    if trace is not None:
        trace.policy(kind.name)
    outcome = run(
        question.workload,
        question.setup,
        kind,
        on_served=lambda _: progress.advance(task),
        on_step=trace.step if trace is not None else None,
    )
    if trace is not None:
        trace.turns(outcome.served, question.setup.num_replicas)
    return outcome


def _fewest(
    question: Question, kinds: list[Kind], outcomes: dict[str, Outcome], progress: Progress
) -> dict[str, int | None]:
    def tried(kind: Kind, num_replicas: int) -> Callable[[Served], None]:
        task = progress.add_task(f"{kind.name} on {num_replicas}", total=question.workload.num_turns())
        return lambda _: progress.advance(task)

    stock = outcomes["stock"].measures
    return {
        kind.name: find_fewest(question, kind, stock, outcomes[kind.name], partial(tried, kind))
        for kind in kinds
        if kind.name != "stock" and not kind.is_bound
    }


def _print(question: Question, outcomes: dict[str, Outcome], fewest: dict[str, int | None]) -> None:
    console = Console()
    about = question.describe_workload()
    recognised = ""
    if about["unnamed_requests"]:
        recognised = (
            f" Recognised {about['recognised_sessions']:,} sessions in {about['unnamed_requests']:,} requests that "
            "name none."
        )
    console.print(
        f"{about['tasks']:,} tasks, {about['turns']:,} requests, {about['prompt_tokens']:,} prompt tokens; working set "
        f"of the {question.num_live:,} live at a time {question.oversubscription:.2g}x HBM; at best "
        f"{about['hit_ratio_bound']:.1%} of prompt tokens are found." + recognised,
        highlight=False,
    )
    headings = [column.heading for column in report.row(next(iter(outcomes.values())))]
    table = Table("", title="Simulated, not measured", title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, outcome in outcomes.items():
        table.add_row(name, *(column.cell for column in report.row(outcome)))
    console.print(table)
    answer = report.saved(outcomes, question.setup.num_replicas)
    held = report.holds(outcomes)
    for line in (answer, *report.spared(question.setup.num_replicas, fewest), held):
        if line is not None:
            console.print(line, highlight=False)
    console.print("Assumed:", highlight=False)
    for line in question.assumptions:
        console.print(f"- {line}", highlight=False)


def _write(out: Path, text: str) -> None:
    if out == Path("-"):
        click.echo(text, nl=False)
    else:
        out_file.write(out, text)

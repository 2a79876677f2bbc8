"""`impala audit`: why the prompts of a log miss the cache, what it costs, and what to do about it."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from impala_vllm.insight.audit import FIXES, Report
from impala_vllm.insight.audit import audit as run
from impala_vllm.insight.audit.report import Finding, Total, tokens
from impala_vllm.workload import Format

FORMATS = [f.value for f in Format if f is not Format.AZURE]
_SHOWN = 5


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(FORMATS), default="auto", show_default=True, help="Log format.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON instead of tables.")
@click.option("--show-text", is_flag=True, help="Show fragments of prompts where they differ.")
@click.option(
    "--price-per-mtok",
    "price",
    type=click.FloatRange(min=0),
    metavar="PRICE",
    help="What a million prompt tokens cost: adds money to each cause.",
)
def audit(file: Path, form: str, as_json: bool, show_text: bool, price: float | None) -> None:
    """Say why prompts in FILE, a log or a directory of logs, do not begin with the prompt before them."""
    if price is not None and not math.isfinite(price):
        raise click.BadParameter(f"{price} is no price", param_hint="'--price-per-mtok'")
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(), TextColumn("{task.completed} requests"),
        console=console, transient=True, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task("auditing", total=None)
        report = run(file, Format(form), show_text=show_text, on_request=lambda: progress.advance(task))
    if as_json:
        click.echo(json.dumps(report.document(price), indent=2))
    else:
        _print(report, price, Console())


def _print(report: Report, price: float | None, console: Console) -> None:
    about = "about " if report.estimated else ""
    share = report.lost_tokens / report.prompt_tokens if report.prompt_tokens else 0.0

    def say(text: str) -> None:
        console.print(Text(text))  # what a log says is no markup

    say(
        f"{report.requests:,} requests in {report.sessions:,} sessions, {report.resumed:,} with a turn before them; "
        f"{about}{report.prompt_tokens:,} prompt tokens, {about}{report.lost_tokens:,} ({share:.1%}) computed again "
        "because a prompt changed."
    )
    if report.causes():
        console.print(_causes(report.causes(), price))
        for total in report.causes():
            say(f"- {total.cause.value}: {FIXES[total.cause]}")
        console.print(_worst(report.worst[:_SHOWN]))
        for finding in report.worst[:_SHOWN]:
            if finding.now is not None:
                say(f"- {finding.request_id}, {finding.segment}:\n    was {finding.was!r}\n    now {finding.now!r}")
    else:
        say("Every prompt begins with the one before it.")
    _tools(report, say)
    if report.estimated:
        say("Tokens are estimated: the log has no token ids, so four bytes count as one; an image as 1,000.")
    if report.sessions_forgotten:
        say(f"{report.sessions_forgotten:,} sessions were forgotten for want of room; if they went on, as new ones.")
    if report.skipped:
        say(f"{report.skipped:,} lines or files were skipped; the first: {report.first_error}")


def _causes(totals: list[Total], price: float | None) -> Table:
    table = Table("cause", "where", title="Why prefixes miss", title_justify="left")
    for heading in ("turns", "sessions", "tokens", *(["cost"] if price is not None else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for total in totals:
        money = [] if price is None else [f"{total.lost_tokens * price / 1e6:.2f}"]
        where = ", ".join(name for name, _ in total.segments.most_common(3))
        table.add_row(
            total.cause.value, where, f"{total.turns:,}", f"{len(total.sessions):,}", f"{total.lost_tokens:,}", *money
        )
    return table


def _worst(findings: list[Finding]) -> Table:
    table = Table(title="Dearest turns", title_justify="left")
    table.add_column("session", overflow="ellipsis", no_wrap=True, max_width=24)
    table.add_column("turn", justify="right")
    for heading in ("segment", "cause"):
        table.add_column(heading)
    table.add_column("tokens", justify="right", no_wrap=True)
    for f in findings:
        table.add_row(Text(f.session), str(f.turn), f.segment, f.cause.value, f"{f.lost_tokens:,}")
    return table


def _tools(report: Report, say: Callable[[str], None]) -> None:
    if not report.tools:
        return
    total = sum(tokens(tool.schema_bytes) for tool in report.tools)
    idle = report.never_called()
    say(f"{len(report.tools)} tools, about {total:,} tokens of schemas; {len(idle)} never called{':' if idle else '.'}")
    for tool in idle[:_SHOWN]:
        say(f"- {tool.name}: about {tokens(tool.schema_bytes):,} tokens in each of {tool.num_requests:,} requests")
    if len(idle) > _SHOWN:
        say(f"- and {len(idle) - _SHOWN} more (--json has all)")

"""`impala audit`: why the prompts of a log miss the cache, what it costs, and what to do about it."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from impala_vllm.cli import audit_table, live_server
from impala_vllm.cli.live_server import Unreachable, is_address
from impala_vllm.config import ConfigError
from impala_vllm.insight.audit import Finding, Report, document, server
from impala_vllm.insight.audit import audit as run
from impala_vllm.workload import Format
from impala_vllm.workload.text_blocks import BLOCK_TOKENS

FORMATS = [f.value for f in Format if f is not Format.AZURE]


@click.command()
@click.argument("source", metavar="FILE|URL")
@click.option("--format", "form", type=click.Choice(FORMATS), default="auto", show_default=True, help="Log format.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON instead of tables.")
@click.option("--each", is_flag=True, help="Print one JSON line for each turn that lost its prefix, and nothing else.")
@click.option("--show-text", is_flag=True, help="Show fragments of prompts where they differ.")
@click.option("--normalise", is_flag=True, help="Audit as if clocks and ids in system prompts stood still.")
@click.option(
    "--block-tokens",
    type=click.IntRange(min=1),
    default=BLOCK_TOKENS,
    show_default=True,
    help="Block size of the server behind a log of messages.",
)
@click.option(
    "--price-per-mtok",
    "price",
    type=click.FloatRange(min=0),
    metavar="PRICE",
    help="What a million prompt tokens cost: adds money to each cause.",
)
@click.option(
    "--price-per-gpu-hour",
    "gpu_price",
    type=click.FloatRange(min=0),
    metavar="PRICE",
    help="The same by what a GPU costs; with --prefill-rate.",
)
@click.option(
    "--prefill-rate",
    "rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="TOKENS",
    help="Prompt tokens that GPU computes in a second.",
)
@click.option("--api-key", envvar="VLLM_API_KEY", show_envvar=True, help="Where a server at URL asks for one.")
def audit(
    source: str,
    form: str,
    as_json: bool,
    each: bool,
    show_text: bool,
    normalise: bool,
    block_tokens: int,
    price: float | None,
    gpu_price: float | None,
    rate: float | None,
    api_key: str | None,
) -> None:
    """Say why prompts do not begin with the prompt before them: those in FILE, a log or a directory of logs, or the
    last ones of the server at URL, by their hashes.
    """
    per_mtok = _price(price, gpu_price, rate)
    if as_json and each:
        raise click.UsageError("--json and --each exclude one another: take one")
    note = _echo if each else None
    if is_address(source):
        for_logs = (
            ("--show-text", show_text),
            ("--normalise", normalise),
            ("--block-tokens", block_tokens != BLOCK_TOKENS),
        )
        given = [name for name, is_given in for_logs if is_given]
        if form != "auto" or given:
            raise click.UsageError(f"{given[0] if given else '--format'} is for logs; a server keeps no prompts")
        report = _server(source.rstrip("/"), api_key, note)
    else:
        report = _log(Path(source), form, block_tokens, show_text, normalise, note)
    if as_json:
        click.echo(json.dumps(document(report, per_mtok, show_text), indent=2))
    elif not each:
        audit_table.show(report, per_mtok, show_text, Console())


def _server(url: str, api_key: str | None, note: Callable[[Finding], None] | None) -> Report:
    try:
        report = server.audit(live_server.links(url, api_key), note)
    except Unreachable as e:
        raise ConfigError(f"{url}: {e}; give the http://HOST:PORT of a running server, or a log") from e
    if not report.requests:
        raise ConfigError(f"{url}: it has served no request yet; send it some, or give a log")
    return report


def _log(
    file: Path, form: str, block_tokens: int, show_text: bool, normalise: bool, note: Callable[[Finding], None] | None
) -> Report:
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(), TextColumn("{task.completed} requests"),
        console=console, transient=True, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task("auditing", total=None)
        return run(
            file,
            Format(form),
            block_tokens=block_tokens,
            show_text=show_text,
            normalised=normalise,
            on_request=lambda: progress.advance(task),
            on_finding=note,
        )


def _echo(finding: Finding) -> None:
    click.echo(json.dumps(finding.document()))


def _price(price: float | None, gpu_price: float | None, rate: float | None) -> float | None:
    """Of a million prompt tokens; None where no price is given."""
    for name, value in (("--price-per-mtok", price), ("--price-per-gpu-hour", gpu_price), ("--prefill-rate", rate)):
        if value is not None and not math.isfinite(value):
            raise click.BadParameter(f"{value} is no number to count with", param_hint=f"'{name}'")
    if (gpu_price is None) != (rate is None):
        raise click.UsageError("--price-per-gpu-hour and --prefill-rate belong together: give both")
    if gpu_price is None or rate is None:
        return price
    if price is not None:
        raise click.UsageError("--price-per-mtok and --price-per-gpu-hour exclude one another: take one")
    return gpu_price / 3600 / rate * 1e6

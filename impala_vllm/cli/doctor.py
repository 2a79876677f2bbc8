"""`impala doctor`: will `--scheduler impala` work here, what will be active, what is missing."""

import contextlib
import json
import os
import sys
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from impala_vllm.cli.checkup import Checkup, examine
from impala_vllm.config import ConfigError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--config", metavar="FILE", help="The YAML file that --impala-config will name. Default: $IMPALA_CONFIG.")
def doctor(as_json: bool, config: str | None) -> None:
    """Check versions, vLLM's seams, the plugin and the configuration. Exit code 1 if impala cannot work here."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # vLLM talks while it is imported
            checkup = examine(config or os.environ.get("IMPALA_CONFIG") or None)
    except ConfigError as e:
        print(f"impala: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    if as_json:
        click.echo(json.dumps(_data(checkup), indent=2))
    else:
        _show(checkup)
    raise SystemExit(0 if checkup.works else 1)


def _data(checkup: Checkup) -> dict[str, Any]:
    return {
        "works": checkup.works,
        "versions": checkup.versions,
        "seams": [{**asdict(seam), "ok": seam.problem is None} for seam in checkup.seams],
        "vllm_plugins": checkup.plugins_filter,
        "active": checkup.active,
        "settings": checkup.settings.describe(),
        "block_io": {
            "directory": checkup.block_io_directory,
            "engine": checkup.block_io_engine,
            **asdict(checkup.block_io),
        },
        "missing": [asdict(lack) for lack in checkup.lacks],
    }


def _show(checkup: Checkup) -> None:
    out = Console(highlight=False, soft_wrap=True)
    out.print("[bold]Versions[/]")
    for name, version in checkup.versions.items():
        out.print(f"  {name:<12} {escape(version) if version else '[dim]not installed[/]'}")
    if checkup.seams:
        out.print("[bold]Seams of vLLM[/]")
    for seam in checkup.seams:
        mark = "[green]ok[/]" if seam.problem is None else f"[red]{escape(seam.problem)}[/]"
        out.print(f"  {seam.name.partition(':')[2]:<52} {seam.use:<28} {mark}")
    out.print("[bold]Active with --scheduler impala[/]")
    for name, text in checkup.active.items():
        out.print(f"  {name:<12} {escape(text)}")
    for line in checkup.settings.describe():
        if not line.endswith("(default)"):
            out.print(f"  {escape(line)}")
    io = checkup.block_io
    out.print(f"[bold]Block I/O[/] in {escape(checkup.block_io_directory)}")
    out.print(f"  io_uring {_yes(io.io_uring)}, direct I/O {_yes(io.direct_io)}: {checkup.block_io_engine} would do it")
    if checkup.lacks:
        out.print("[bold]Missing[/]")
    for lack in checkup.lacks:
        color = "red" if lack.is_fatal else "yellow"
        out.print(f"  [{color}]{escape(lack.what)}[/]: {escape(lack.effect)}. To mend it: {escape(lack.get)}")
    out.print("[green]impala works here.[/]" if checkup.works else "[red]impala cannot work here.[/]")


def _yes(value: bool | None) -> str:
    return "unknown" if value is None else ("yes" if value else "no")

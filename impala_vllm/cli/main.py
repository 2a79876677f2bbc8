"""The `impala` command: finds the subcommand, and turns what went wrong into one line and an exit code.

Each command lives in a file of its own, imported when it is asked for: help is quick and a base
install works without what other commands need.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

import click

from impala_vllm.cli.printable import printable
from impala_vllm.config import ConfigError
from impala_vllm.workload.source import WorkloadError

COMMANDS = {
    "identify": "recognise the traces in a log",
    "audit": "say why prefixes miss, and what it costs",
    "report": "say what a ledger's traces took, and what they waited for",
    "top": "watch a live server",
    "simulate": "replay a log in virtual time under several policies",
    "doctor": "say what works here and what is missing",
    "router": "serve a fleet of vLLM servers behind one address",
    "demo": "run stock vLLM and impala on a small recorded load",
}
"""Name and one-line help of each command; `impala_vllm.cli.NAME` holds it as `NAME`."""

BAD_INPUT = 2


class _Lazy(click.Group):
    """A group that imports a command only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"impala_vllm.cli.{cmd_name}"), cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=lambda c, p, v: _version(c, v))
def impala() -> None:
    """Traces, not requests: tools around `vllm serve --scheduler impala`."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run, and exit: 0, the command's own code, or 2 with one line on stderr for bad usage and bad input."""
    try:
        code = impala.main(args=argv, prog_name="impala", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as e:
        click.echo(e.format_message(), err=True)
        sys.exit(BAD_INPUT)
    except click.UsageError as e:
        where = e.ctx.command_path if e.ctx else "impala"
        _fail(f"{e.format_message().rstrip('.')}; see `{where} --help`")
    except (ConfigError, WorkloadError, click.ClickException) as e:
        _fail(e.format_message() if isinstance(e, click.ClickException) else str(e))
    except click.Abort:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe went away
        _drop_output()
        sys.exit(0)
    except OSError as e:  # commands explain their own files: what is left is the output
        _drop_output()
        _fail(f"{e.filename or 'standard output'}: {e.strerror or e}; make room, or write elsewhere")
    sys.exit(code if isinstance(code, int) else 0)


def _drop_output() -> None:
    """Send what is still buffered nowhere: the flush at exit would fail again, and change the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _version(ctx: click.Context, wanted: bool) -> None:
    if wanted:
        try:
            click.echo(f"impala-vllm {version('impala-vllm')}")
        except PackageNotFoundError:
            click.echo("impala-vllm (not installed)")
        ctx.exit()


def _fail(message: str) -> NoReturn:
    click.echo("impala: " + printable(" ".join(message.split())), err=True)
    sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()

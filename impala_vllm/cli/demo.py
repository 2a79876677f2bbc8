"""`impala demo`: stock vLLM beside impala on a small recorded load; a table and an HTML report."""

import importlib.util
import signal
import sys
from pathlib import Path

import click


class _Refused(click.ClickException):
    """One line, exit 2."""

    exit_code = 2


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("impala-demo"),
    show_default=True,
    help="Directory for the report, the figures and the servers' logs.",
)
def demo(out: Path) -> None:
    """Stock vLLM and impala on a bundled recording of real agents. No GPU and no model needed."""
    _check()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.html").open("a").close()
    except OSError as e:
        raise _Refused(f"{out}: cannot write there ({e.strerror}); give --out another directory") from e

    from rich.console import Console

    from impala_vllm.replay import demo as replay_demo
    from impala_vllm.replay.server import ServerError
    from impala_vllm.replay.tiny_model import TinyModelError
    from impala_vllm.replay.vocabulary import ModelError

    # A terminated demo takes its servers along, as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console()
    try:
        outcome = replay_demo.run(out, console)
    except (ServerError, TinyModelError, ModelError) as e:
        raise _Refused(str(e)) from e
    console.print(f"report: {outcome.html}", highlight=False, soft_wrap=True)
    if outcome.num_failed:
        raise click.ClickException(f"{outcome.num_failed} requests failed; see {out / 'logs'}")


def _check() -> None:
    """What the demo cannot do without, before anything is written."""
    if importlib.util.find_spec("vllm") is None:
        raise _Refused(
            "vLLM is not installed; `pip install 'impala-vllm[vllm]'` on a GPU machine, "
            "`make setup` in a checkout for a CPU one"
        )
    missing = [name for name in ("aiohttp", "jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise _Refused(f"{', '.join(missing)} not installed; `pip install 'impala-vllm[bench]'`")

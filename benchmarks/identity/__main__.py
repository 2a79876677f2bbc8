"""`python -m benchmarks.identity --traces FILE_OR_DIR`: replay it online, score it, print it, record it.

The same requests go to a naive owner and to `core.identity` at its default configuration, once a seed.
Where to get the logs: docs/identity.md.
"""

import re
import sys
from math import isfinite
from pathlib import Path
from random import Random
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from benchmarks import record
from benchmarks.identity import figures
from benchmarks.identity.naive import MIN_BLOCKS, Naive
from benchmarks.identity.trial import Trial, replay
from impala_vllm.core.identity import Identity, IdentityConfig
from impala_vllm.workload import Format, Recogniser, Turn, WorkloadError, interleave, load
from impala_vllm.workload.text_blocks import BLOCK_TOKENS

FORMATS = [f.value for f in Format if f is not Format.AZURE]


@click.command()
@click.option("--traces", type=click.Path(path_type=Path), required=True, help="Log, or directory of logs.")
@click.option("--format", "form", type=click.Choice(FORMATS), default="auto", show_default=True, help="Log format.")
@click.option(
    "--interleave",
    "spread_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Let recordings overlap: start each at a random time within SECONDS.",
)
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds of --interleave, one repetition each.")
@click.option("--block-tokens", type=click.IntRange(min=1), help=f"Block of logs of text; {BLOCK_TOKENS} otherwise.")
@click.option(
    "--naive-blocks",
    type=click.IntRange(min=1),
    default=MIN_BLOCKS,
    show_default=True,
    help="Shortest match the naive owner believes.",
)
@click.option("--name", help="What the records call the log; its file name otherwise.")
@click.option("--no-record", is_flag=True, help="Do not add to benchmarks/results.")
def main(**options: Any) -> None:
    """Link F1 of a naive owner and of impala on a recorded log that knows its traces."""
    try:
        _run(**options)
    except (WorkloadError, ValueError) as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("stopped; nothing was recorded", err=True)
        sys.exit(130)


def _run(
    traces: Path,
    form: str,
    spread_s: float | None,
    seeds: str,
    block_tokens: int | None,
    naive_blocks: int,
    name: str | None,
    no_record: bool,
) -> None:
    if spread_s is not None and not isfinite(spread_s):
        raise ValueError(f"--interleave {spread_s}: give a number of seconds")
    chosen = _seeds(seeds) if spread_s is not None else [None]
    label = _label(name or traces.name.partition(".")[0])
    console = Console(stderr=True)
    trials: list[Trial] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=None)
        turns = _read(traces, form, block_tokens)
        progress.update(task, total=2 * len(chosen) * len(turns), completed=0)
        for seed in chosen:
            overlapping = turns if spread_s is None or seed is None else interleave(turns, spread_s, Random(seed))
            variants: dict[str, Recogniser] = {"naive": Naive(naive_blocks), "impala": Identity(IdentityConfig())}
            for variant, recogniser in variants.items():
                progress.update(task, description=variant if seed is None else f"{variant}, seed {seed}")
                trials.append(replay(variant, recogniser, overlapping, lambda: progress.advance(task)))
    params = {
        "log": traces.name,
        "requests": len(turns),
        "recordings": len({turn.recording for turn in turns}),
        "traces in truth": len({turn.trace_id for turn in turns if turn.trace_id}),
        "tokens a block": ", ".join(str(size) for size in sorted({turn.block_size for turn in turns})),
        "starts": "as recorded" if spread_s is None else f"within {spread_s:g} s",
        "seeds": "-" if spread_s is None else ", ".join(str(seed) for seed in chosen),
        "naive": f"owner of the longest known prefix of at least {naive_blocks} blocks",
        "impala": "default configuration",
    }
    seed = chosen[0] if len(chosen) == 1 else None
    made = figures.records(f"identity/{label}", params, seed, trials, record.origin())
    figures.show(made, Console())
    if not no_record:
        place = record.append(made)
        console.print(f"recorded in {place}; `python -m benchmarks.report` writes RESULTS.md", soft_wrap=True)


def _read(traces: Path, form: str, block_tokens: int | None) -> list[Turn]:
    turns = load(traces, form, block_tokens or BLOCK_TOKENS)
    if not any(turn.trace_id for turn in turns):
        raise WorkloadError(f"{traces}: it does not say which trace a request belongs to; give a log with ground truth")
    if block_tokens and any(turn.block_size != block_tokens for turn in turns):
        raise WorkloadError(f"{traces}: it holds blocks, not text; leave out --block-tokens")
    return turns


def _seeds(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"--seeds {text}: give whole numbers with commas between, such as 0,1,2")
    return list(dict.fromkeys(int(seed) for seed in text.split(",")))


def _label(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+", text):
        raise ValueError(f"--name {text!r}: give one of letters, digits, dots and hyphens")
    return text


if __name__ == "__main__":
    main()

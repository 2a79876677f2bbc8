"""`impala identify`: the traces of a log, by the same online code the engine runs, scored if the log knows them."""

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import IO, Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from impala_vllm.cli import out_file
from impala_vllm.core.identity import Identity, IdentityConfig
from impala_vllm.core.types import Link
from impala_vllm.workload import Format, Turn, WorkloadError, interleave, links, load
from impala_vllm.workload.score import Parents, Score, Tally

FORMATS = [f.value for f in Format if f is not Format.AZURE]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(FORMATS), default="auto", show_default=True, help="Log format.")
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write one JSON line a request.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON instead of a table.")
@click.option(
    "--interleave",
    "spread_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Let recordings overlap: start each at a random time within SECONDS.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of --interleave.")
def identify(file: Path, form: str, out: Path | None, as_json: bool, spread_s: float | None, seed: int) -> None:
    """Recognise the traces in FILE, a log or a directory of logs, without client ids."""
    if spread_s is not None and not math.isfinite(spread_s):
        raise click.BadParameter(f"{spread_s} is no number of seconds", param_hint="'--interleave'")
    if out is not None:
        out_file.check(out, [file], "the log")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=None)
        turns = load(file, form)
        if spread_s is not None:
            turns = interleave(turns, spread_s, Random(seed))
        progress.update(task, description="identifying", total=len(turns), completed=0)
        score = Score()
        sources: Counter[str] = Counter()
        traces: set[str] = set()
        with _replacing(out) as sink:
            for turn, link in links(turns, Identity(IdentityConfig())):
                score.note(turn, link)
                sources[link.source.value] += 1
                traces.add(link.trace_id)
                if sink is not None:
                    sink.write(json.dumps(_line(turn, link)) + "\n")
                progress.advance(task)
    result = {"requests": len(turns), "traces": len(traces), "sources": dict(sources), "score": report(score)}
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        _print(result)


def report(score: Score) -> dict[str, Any] | None:
    """The figures as plain data; None where the log has no ground truth."""
    if not score.by_kind:
        return None
    return {
        "link_f1": round(score.link_f1, 4),
        "precision": round(score.precision, 4),
        "recall": round(score.recall, 4),
        "exact_link_f1": round(score.exact_f1, 4),
        "by_kind": {kind.value: _tally(tally) for kind, tally in score.by_kind.items()},
        "by_source": {source.value: _tally(tally) for source, tally in score.by_source.items()},
        "parents": _parents(score.parents),
        "parents_at_start": _parents(score.parents_at_start),
    }


def _line(turn: Turn, link: Link) -> dict[str, Any]:
    return {
        "request_id": turn.request_id,
        "trace_id": link.trace_id,
        "parent_trace_id": link.parent_trace_id,
        "source": link.source.value,
        "confidence": link.confidence,
    }


@contextmanager
def _replacing(path: Path | None) -> Iterator[IO[str] | None]:
    """A file that appears under its name only when everything went well."""
    if path is None:
        yield None
        return
    path = path.resolve()  # what a link points to is replaced, not the link
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as e:
        raise WorkloadError(f"{path}: cannot write there ({e.strerror}); give -o a file in a writable folder") from e
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as sink:
            yield sink
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(name, path)
    except BaseException as e:
        os.unlink(name)
        if isinstance(e, OSError):
            raise WorkloadError(f"{path}: cannot write it ({e.strerror}); make room, or give -o another folder") from e
        raise


def _tally(tally: Tally) -> dict[str, Any]:
    return {"right": tally.right, "total": tally.total, "share": tally.share()}


def _parents(parents: Parents) -> dict[str, int]:
    return {
        "right": parents.right,
        "wrong": parents.wrong,
        "missed": parents.missed,
        "given_without_need": parents.unasked,
    }


def _print(result: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{result['requests']} requests in {result['traces']} traces")
    table = Table("recognised as", "requests")
    for source, number in sorted(result["sources"].items(), key=lambda item: -item[1]):
        table.add_row(source, str(number))
    console.print(table)
    score = result["score"]
    if score is None:
        console.print("The log does not say which trace a request belongs to, so there is no score.")
        return
    table = Table("truly a", "right", "of")
    for kind, tally in score["by_kind"].items():
        table.add_row(kind, str(tally["right"]), str(tally["total"]))
    console.print(table)
    console.print(
        f"link F1 {score['link_f1']:.4f} (precision {score['precision']:.4f}, recall {score['recall']:.4f});"
        f" parents: {', '.join(f'{number} {name}' for name, number in score['parents'].items())}"
    )

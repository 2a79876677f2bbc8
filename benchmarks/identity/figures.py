"""Trials into records, and records onto a terminal."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from benchmarks.identity.trial import Trial
from benchmarks.record import Origin, Record
from impala_vllm.workload.score import Kind

_Figures: TypeAlias = tuple[tuple[str, str, str, Callable[[Trial], float]], ...]
"""Metric, unit, which way is better, how to get it."""

_FIGURES: _Figures = (
    ("link F1", "", "higher", lambda t: t.score.link_f1),
    ("link precision", "", "higher", lambda t: t.score.precision),
    ("link recall", "", "higher", lambda t: t.score.recall),
    ("predecessor F1", "", "higher", lambda t: t.score.predecessor_f1),
    ("traces", "", "-", lambda t: t.num_traces),
)
_PARENTS: _Figures = (
    ("sub-agents with the right parent", "", "higher", lambda t: t.score.parents.right),
    ("sub-agents with a wrong parent", "", "lower", lambda t: t.score.parents.wrong),
    ("sub-agents without a parent", "", "lower", lambda t: t.score.parents.missed),
)
_REST: _Figures = (
    ("spurious parents", "", "lower", lambda t: t.score.parents.unasked),
    ("mean time of an arrival", "us", "lower", lambda t: t.arrive_us),
    ("mean time of an end", "us", "lower", lambda t: t.finish_us),
)


def records(
    question: str, params: dict[str, Any], seed: int | None, trials: Sequence[Trial], origin: Origin
) -> list[Record]:
    """Every figure of every variant over its repetitions. What the log holds none of is left out."""
    made: list[Record] = []

    def add(variant: str, metric: str, unit: str, better: str, values: Sequence[float], **extra: Any) -> None:
        made.append(origin.record(question, variant, {**params, **extra}, metric, unit, better, values, seed=seed))

    for variant in dict.fromkeys(t.variant for t in trials):
        runs = [t for t in trials if t.variant == variant]
        subagents = any(Kind.SUBAGENT_START in t.score.by_kind for t in runs)
        for metric, unit, better, of in (*_FIGURES, *(_PARENTS if subagents else ()), *_REST):
            add(variant, metric, unit, better, [of(t) for t in runs])
        for kind in Kind:
            tallies = [t.score.by_kind[kind] for t in runs if kind in t.score.by_kind]
            shares = [share for tally in tallies if (share := tally.share()) is not None]
            if shares:
                numbers = sorted({tally.total for tally in tallies})
                of = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
                add(variant, f"{kind.value.replace('_', ' ')} right", "", "higher", shares, of=of)
    return made


def show(made: Sequence[Record], console: Console) -> None:
    """A table, variants as columns; ranges over repetitions where they differ."""
    variants = list(dict.fromkeys(r.variant for r in made))
    table = Table("metric", *variants, "of")
    for metric in dict.fromkeys(r.metric for r in made):
        rows = {r.variant: r for r in made if r.metric == metric}
        number = next(iter(rows.values())).params.get("of", "")
        table.add_row(metric, *(_cell(rows[v]) if v in rows else "" for v in variants), number)
    console.print(table)


def _cell(r: Record) -> str:
    spread = f" ({r.p20:.4g}-{r.p80:.4g})" if r.p20 != r.p80 else ""
    return f"{r.p50:.4g}{f' {r.unit}' if r.unit else ''}{spread}"

"""One self-contained HTML page that answers "what would I save with this log?". Needs jinja2 and matplotlib."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from impala_vllm import __version__
from impala_vllm.insight import templates
from impala_vllm.sim import report
from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.question import Question
from impala_vllm.sim.simulation import Outcome


class Tile(NamedTuple):
    """A figure that stands out."""

    figure: str
    meaning: str


class Row(NamedTuple):
    """A policy."""

    name: str
    about: str
    is_bound: bool
    cells: tuple[str, ...]


def render(
    log: str, question: Question, seed: int, outcomes: Mapping[str, Outcome], fewest: Mapping[str, int | None]
) -> str:
    """The page as text. `log`: its name; at least one outcome; `fewest` as in `report.document`."""
    from impala_vllm.sim import plots

    engines = report.replicas(question.setup.num_replicas)
    is_compared = report.saved(outcomes, question.setup.num_replicas) is not None
    asks = f"What would impala save on {engines}" if is_compared else f"What would it cost on {engines}"
    context: dict[str, Any] = {
        "title": f"{asks} with {log}?",
        "version": __version__,
        "seed": seed,
        "tiles": tiles(outcomes),
        "answer": answer(question, outcomes, fewest),
        "workload": question.describe_workload(),
        "question": question,
        "columns": report.row(next(iter(outcomes.values()))),
        "rows": rows(outcomes),
        "waits": plots.waits(outcomes),
        "spread": plots.spread(outcomes),
        "tokens": plots.tokens(outcomes),
    }
    return templates.render("impala_vllm.sim", context)


def tiles(outcomes: Mapping[str, Outcome]) -> list[Tile]:
    """impala against stock; nothing unless both were run."""
    if "stock" not in outcomes or "impala" not in outcomes:
        return []
    stock, impala = outcomes["stock"], outcomes["impala"]
    a, b = stock.measures, impala.measures
    return [
        Tile(report.change(b.stall_mean_s, a.stall_mean_s), "time that a task waits for servers"),
        Tile(report.change(b.jct_mean_s, a.jct_mean_s), "time until a task is done"),
        Tile(report.change(b.tasks_per_hour, a.tasks_per_hour), "tasks an hour"),
        Tile(report.change(impala.busy_s, stock.busy_s), "engine time for the same work"),
    ]


def answer(question: Question, outcomes: Mapping[str, Outcome], fewest: Mapping[str, int | None]) -> list[str]:
    """The question answered in sentences, best known first."""
    said: list[str] = []
    count = question.setup.num_replicas
    if "stock" in outcomes and "impala" in outcomes:
        stock, impala = outcomes["stock"], outcomes["impala"]
        a, b = stock.measures, impala.measures
        said.append(
            f"With stock vLLM a task waits {report.figure(a.stall_mean_s)} s for servers, with impala "
            f"{report.figure(b.stall_mean_s)} s; it is done after {report.figure(a.jct_mean_s)} and "
            f"{report.figure(b.jct_mean_s)} s, tools included. {report.replicas(count).capitalize()} finish"
            f"{'es' if count == 1 else ''} {report.figure(a.tasks_per_hour)} and {report.figure(b.tasks_per_hour)} "
            "tasks an hour."
        )
        busy = [f"{report.utilisation(found, count):.0%}" for found in (stock, impala)]
        said.append(
            f"Engines compute for {report.figure(stock.busy_s / 3600)} hours with stock, {busy[0]} of the time, and "
            f"for {report.figure(impala.busy_s / 3600)} with impala, {busy[1]}."
        )
    said += report.spared(count, fewest)
    if not fewest and count > 1 and "stock" in outcomes and len(outcomes) > 1:
        said.append("How many replicas could be done without is what --fewest finds.")
    rivals = {n: o for n, o in outcomes.items() if n != "impala" and not KINDS[n].is_bound}
    if "impala" in outcomes and len(rivals) > 1:
        best = min(rivals, key=lambda n: rivals[n].measures.stall_mean_s)
        ours, theirs = outcomes["impala"].measures.stall_mean_s, rivals[best].measures.stall_mean_s
        said.append(
            f"Of the other policies tasks wait least under {best}, {report.figure(theirs)} s: impala "
            f"{report.change(ours, theirs)}."
        )
    held = report.holds(outcomes)
    if held is not None:
        said.append(held)
    if "unbounded" in outcomes:
        least = outcomes["unbounded"].measures.stall_mean_s
        said.append(f"With memory for everything, which no server has, stock vLLM would have tasks wait "
                    f"{report.figure(least)} s.")  # fmt: skip
    return said


def rows(outcomes: Mapping[str, Outcome]) -> list[Row]:
    """Policies in the order given, bounds last."""
    made = [
        Row(name, KINDS[name].about, KINDS[name].is_bound, tuple(column.cell for column in report.row(outcome)))
        for name, outcome in outcomes.items()
    ]
    return sorted(made, key=lambda row: row.is_bound)

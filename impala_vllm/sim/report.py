"""Outcomes as the JSON that scripts read, and as the rows that people read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from impala_vllm.sim.question import Question
from impala_vllm.sim.simulation import Outcome

PATIENCE_S = 600.0
"""OpenAI clients wait so long unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Column:
    """A figure: its heading, what it means, how it is written."""

    heading: str
    meaning: str
    cell: str


def document(
    question: Question, seed: int, outcomes: Mapping[str, Outcome], fewest: Mapping[str, int | None]
) -> dict[str, Any]:
    """What `--json` writes. `fewest`: replicas with which a policy does what stock does with all; may be empty."""
    return {
        "workload": question.describe_workload(),
        "config": question.describe_config(seed),
        "policies": {
            name: {
                **asdict(found.measures),
                "engine_busy_s": found.busy_s,
                "preemptions": found.num_preemptions,
                **({"fewest_replicas": fewest[name]} if name in fewest else {}),
            }
            for name, found in outcomes.items()
        },
    }


def row(outcome: Outcome) -> list[Column]:
    """A policy's figures, in the order of the table."""
    m = outcome.measures
    return [
        Column("stall s", "mean time that a task waits for the servers", figure(m.stall_mean_s)),
        Column("p95 s", "the same for the unluckiest tasks", figure(m.stall_p95_s)),
        Column("done s", "mean time from a task's first request to its last answer", figure(m.jct_mean_s)),
        Column("tasks/h", "tasks finished an hour", figure(m.tasks_per_hour)),
        Column("found", "share of prompt tokens found in a cache", f"{m.hit_ratio:.1%}"),
        Column("again", "prompt tokens that had been computed before", _count(m.recomputed_tokens)),
        Column("engine s", "time that engines computed", figure(outcome.busy_s)),
    ]


def saved(outcomes: Mapping[str, Outcome], num_replicas: int) -> str | None:
    """What impala saves against stock, in a sentence. None unless both were run."""
    if "stock" not in outcomes or "impala" not in outcomes:
        return None
    stock, impala = outcomes["stock"], outcomes["impala"]
    a, b = stock.measures, impala.measures
    return (
        f"On {replicas(num_replicas)}, impala against stock vLLM: {change(b.stall_mean_s, a.stall_mean_s)} stall, "
        f"{change(b.jct_mean_s, a.jct_mean_s)} completion time, {change(b.tasks_per_hour, a.tasks_per_hour)} tasks "
        f"an hour, {change(impala.busy_s, stock.busy_s)} engine time for the same work."
    )


def utilisation(outcome: Outcome, num_replicas: int) -> float:
    """Share of the time that engines computed, while anything was left to serve."""
    return outcome.busy_s / (outcome.measures.makespan_s * num_replicas)


def holds(outcomes: Mapping[str, Outcome]) -> str | None:
    """Who keeps turns back for longer than clients wait, in a sentence. None: nobody."""
    longest = {n: o.measures.max_hold_s for n, o in outcomes.items() if o.measures.max_hold_s > PATIENCE_S}
    if not longest:
        return None
    names = ", ".join(f"{name} {figure(hold_s)} s" for name, hold_s in longest.items())
    return f"Clients that give up after {PATIENCE_S:g} s would have done so. Longest holds of a turn: {names}."


def spared(num_replicas: int, fewest: Mapping[str, int | None]) -> list[str]:
    """Who does with fewer what stock does with all, a sentence each."""
    said: list[str] = []
    for name, count in fewest.items():
        what = f"lets tasks wait no longer than stock on {replicas(num_replicas)}, and ends as many an hour"
        if count is None:
            said.append(f"{name} does not do as well as stock on {replicas(num_replicas)}.")
        else:
            left = num_replicas - count
            said.append(f"On {replicas(count)} {name} {what}: {left or 'none'} could be done without.")
    return said


def replicas(count: int) -> str:
    """So many, in words."""
    return f"{count:,} replica" + ("s" if count > 1 else "")


def change(value: float, base: float) -> str:
    """By how much a figure differs from that of another policy."""
    if not base:
        return "more" if value else "the same"
    share = f"{value / base - 1:+.0%}"
    return "the same" if share in ("+0%", "-0%") else share


def figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _count(value: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)

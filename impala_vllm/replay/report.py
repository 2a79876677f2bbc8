"""One self-contained HTML page about a set of trials, for a reader who has never heard of this."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from impala_vllm import __version__
from impala_vllm.insight import templates
from impala_vllm.replay.arms import Arm, Machine
from impala_vllm.replay.linkage import SessionScore
from impala_vllm.replay.load import Load
from impala_vllm.replay.lowering import Scale
from impala_vllm.replay.measures import Measures, quantile
from impala_vllm.replay.plan import Plan
from impala_vllm.replay.trial import Trial


@dataclass(frozen=True, slots=True)
class Report:
    """What the page is about."""

    title: str
    plan: Plan
    arms: tuple[Arm, ...]
    trials: tuple[Trial, ...]
    machine: Machine
    scale: Scale
    load: Load


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table of figures: a name, what it means, a cell an arm."""

    name: str
    meaning: str
    cells: tuple[str, ...]


def write(report: Report, path: Path) -> None:
    """Render to `path`, replacing it. Raises OSError where it cannot be written."""
    path.write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """The page as text; needs jinja2 and matplotlib (the `bench` extra)."""
    from impala_vllm.replay import plots

    shown = _first_of_each(report.trials)
    names = _names(report.plan)
    recognising = next((t for t in shown if t.links is not None), None)
    context: dict[str, Any] = {
        "title": report.title,
        "version": __version__,
        "plan": report.plan,
        "oversubscription": report.plan.working_set_tokens() / (report.machine.hbm_blocks * report.machine.block_size),
        "working_set": report.plan.working_set_tokens(),
        "machine": report.machine,
        "scale": report.scale.describe(),
        "load": report.load.describe(),
        "arms": [a for a in report.arms if any(t.arm == a.name for t in shown)],
        "num_runs": len(report.trials),
        "repeats": len(report.trials) // max(1, len(shown)),
        "rows": rows(report.trials),
        "stake": stake(report.trials),
        "completion": plots.completion(shown, names),
        "timeline": plots.timeline(shown, names),
        "work": plots.work(shown),
        "child": next((names[s.session_id] for s in report.plan.sessions if s.parent_id is not None), None),
        "links": recognising.links if recognising else None,
        "sessions": [(names[s.session_id], s, verdict(s)) for s in recognising.links.sessions]
        if recognising and recognising.links
        else [],
        "failed": sum(t.measures.num_failed for t in report.trials),
    }
    return templates.render("impala_vllm.replay", context)


def rows(trials: Sequence[Trial]) -> list[Row]:
    """The figures of every arm, medians over its repetitions."""
    arms = list(dict.fromkeys(t.arm for t in trials))

    def row(name: str, meaning: str, field: str, form: str) -> Row:
        cells: list[str] = []
        for arm in arms:
            values = [v for t in trials if t.arm == arm and (v := getattr(t.measures, field)) is not None]
            cells.append(form.format(quantile(values, 0.5)) if values else "-")
        return Row(name, meaning, tuple(cells))

    return [
        row("Tasks per hour", "sessions finished, per hour of server time", "tasks_per_hour", "{:,.0f}"),
        row("Completion time, mean", "first request of a session to its last answer", "jct_mean_s", "{:.1f} s"),
        row("Stall, mean", "the part of it that the server is to blame for", "stall_mean_s", "{:.1f} s"),
        row("Stall, p95", "the same for the unluckiest sessions", "stall_p95_s", "{:.1f} s"),
        row("Wait after a tool, p50", "until the first word of the next answer", "resume_ttft_p50_s", "{:.2f} s"),
        row("Wait after a tool, p95", "the same, one in twenty is worse", "resume_ttft_p95_s", "{:.2f} s"),
        row("Found in the cache", "share of prompt tokens", "cached_share", "{:.0%}"),
        row("Could have been", "with endless memory", "hit_bound", "{:.0%}"),
        row("Computed again", "prompt tokens the server had computed before", "recomputed_tokens", "{:,.0f}"),
    ]


@dataclass(frozen=True, slots=True)
class Stake:
    """How far stock vLLM is from a server that never forgets, and impala on the way."""

    stock: Measures
    unbounded: Measures
    stall_ratio: float
    impala: Measures | None = None
    """Where the arm that decides was run."""


def stake(trials: Sequence[Trial]) -> Stake | None:
    """None unless stock and unbounded were run."""
    first = {t.arm: t.measures for t in reversed(trials)}
    if "stock" not in first or "unbounded" not in first:
        return None
    stock, unbounded = first["stock"], first["unbounded"]
    ratio = stock.stall_mean_s / max(unbounded.stall_mean_s, 1e-9)
    return Stake(stock, unbounded, ratio, first.get("impala-enforce"))


def verdict(session: SessionScore) -> str:
    """A few words on how well a session was recognised."""
    if session.trace_id is None:
        return "not seen"
    words = "right" if session.num_right == session.num_turns else f"{session.num_turns - session.num_right} wrong"
    if session.parent_id is not None:
        words += ", parent found" if session.parent_right else ", parent not found"
    elif session.parent_right is False:
        words += ", parent invented"
    return words


def _first_of_each(trials: Sequence[Trial]) -> list[Trial]:
    return list({t.arm: t for t in reversed(trials)}.values())[::-1]


def _names(plan: Plan) -> dict[str, str]:
    """Short names in order: 1, 2, 2a (a child of 2)."""
    names: dict[str, str] = {}
    for i, root in enumerate(plan.roots(), 1):
        names[root.session_id] = str(i)
        children = [s for s in plan.sessions if s.parent_id == root.session_id]
        for letter, child in zip(_letters(), children, strict=False):
            names[child.session_id] = f"{i}{letter}"
    # Grandchildren are rare enough to keep their recorded names.
    return {s.session_id: names.get(s.session_id, s.session_id) for s in plan.sessions} | names


def _letters() -> list[str]:
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    return [*alphabet, *(a + b for a in alphabet for b in alphabet)]

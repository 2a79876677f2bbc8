"""Trials into records, and records onto a terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.record import Origin, Record
from benchmarks.serving import links
from benchmarks.serving.experiment import Experiment
from impala_vllm.replay import parts
from impala_vllm.replay.arms import ARMS, Machine
from impala_vllm.replay.comparison import ratio
from impala_vllm.replay.measures import measure
from impala_vllm.replay.plan import Plan
from impala_vllm.replay.trial import Trial

_HIGHER = ("tasks_per_hour", "requests_per_s", "output_tokens_per_s", "cached_share")
_CONTEXT = ("hit_bound", "gaps_mean_s", "prompt_tokens", "output_tokens")
_TIER_SHARES = {
    "resumes that found their KV in HBM or host": ("resumed_turns_found", "resumed_turns", "higher"),
    "KV of one-shots on NVMe": ("one_shot_nvme_bytes", "one_shot_bytes", "lower"),
    "KV written to NVMe of what host took": ("nvme_write_bytes", "host_store_bytes", "-"),
}
"""Of our tiers: part, whole, what is better."""


def describe(plan: Plan, experiment: Experiment, machine: Machine) -> str:
    """One line on what is about to run."""
    cut = f"; {plan.num_capped_sessions} sessions cut at the context" if plan.num_capped_sessions else ""
    return (
        f"{len(plan.roots())} tasks, {plan.num_turns()} requests, {plan.prompt_tokens():,} prompt tokens, "
        f"working set {plan.working_set_tokens():,}{cut}; {experiment.scale.describe()}; "
        f"{experiment.load.describe()}; {machine.describe()}"
    )


def figure(trial: Trial, name: str) -> float | None:
    """A trial's figure by its name in `Experiment.figures`; None where it cannot be told."""
    if " / " in name:
        over, under = (figure(trial, part) for part in name.split(" / "))
        return None if over is None or not under else over / under
    field, _, part = name.partition(" of ")
    return getattr(measure(parts.only(trial.run, part)) if part else trial.measures, field)


def tier_shares(runs: Sequence[Trial]) -> list[tuple[str, str, list[float]]]:
    """What our tiers tell of themselves: a share's name, what is better, and its per cent in each run that has it."""
    found = (
        (name, better, [100 * t.tiers[part] / t.tiers[total] for t in runs if part in t.tiers and t.tiers.get(total)])
        for name, (part, total, better) in _TIER_SHARES.items()
    )
    return [share for share in found if share[2]]


def whole(trials: Sequence[Trial], arms: Sequence[str]) -> list[Trial]:
    """Trials of the repetitions that every one of `arms` has ended."""
    num = min(sum(t.arm == arm for t in trials) for arm in arms)
    return [t for t in trials if t.repetition < num]


def records(
    experiment: Experiment,
    trials: Sequence[Trial],
    plan: Plan,
    machine: Machine,
    traces: Path,
    options: Mapping[str, Any],
) -> list[Record]:
    """Every figure of every arm, ratios to the first arm, and identity where an arm recognises."""
    arms = list(dict.fromkeys(t.arm for t in trials))
    by_arm = {arm: [t for t in trials if t.arm == arm] for arm in arms}
    has_tiers = any(ARMS[arm].tiers for arm in arms)
    tiers: dict[str, str] = {"tiers": machine.room.describe()} if has_tiers else {}
    if has_tiers and experiment.links:
        tiers["links"] = links.describe(experiment.links, options.get("host_cap"), options.get("nvme_cap"))
    params: dict[str, Any] = {
        "log": traces.name,
        "tasks": len(plan.roots()),
        "requests": plan.num_turns(),
        "prompt tokens": plan.prompt_tokens(),
        "working set": f"{plan.working_set_tokens()} tokens",
        "oversubscription": round(plan.working_set_tokens() / (machine.hbm_blocks * machine.block_size), 2),
        "scale": experiment.scale.describe(),
        "load": experiment.load.describe(),
        "engine": machine.describe(),
        **tiers,
        "cold": "fresh engine" if options["fresh_engines"] else "fresh cache salt, engines side by side",
        "sessions cut": plan.num_capped_sessions,
        "turns dropped": plan.num_dropped_turns,
    }
    times = options.get("oversubscription")
    question = f"serving/{experiment.name}" + (f"-{times:g}x" if times else "")
    make = _Maker(question, params, options["seed"], record.origin())
    made: list[Record] = []
    for arm, runs in by_arm.items():
        made.append(make.of(arm, "num_failed", [t.measures.num_failed for t in runs]))
        for name in experiment.figures:
            values = [v for t in runs if (v := figure(t, name)) is not None]
            if values:
                made.append(make.of(arm, name, values))
        shares = [100 * t.observer_s / t.measures.makespan_s for t in runs if t.observer_s is not None]
        if shares:
            made.append(make.of(arm, "share of time in impala's hooks", shares))
        made += [make.share(arm, name, better, values) for name, better, values in tier_shares(runs)]
        if all(t.links is not None for t in runs):
            made += _identity(make, arm, runs)
    for name in experiment.ratios:
        base = [figure(t, name) for t in by_arm[arms[0]]]
        for arm in arms[1:]:
            pairs = [(b, v) for b, t in zip(base, by_arm[arm], strict=True) if b and (v := figure(t, name)) is not None]
            if pairs:
                made.append(make.ratio(arm, arms[0], name, *zip(*pairs, strict=True)))
    return made


def show(made: Sequence[Record], console: Console) -> None:
    """A table, arms as columns."""
    arms = list(dict.fromkeys(r.variant for r in made))
    table = Table("metric", *arms)
    for metric in dict.fromkeys(r.metric for r in made):
        cells = {r.variant: _cell(r) for r in made if r.metric == metric}
        table.add_row(metric, *(cells.get(arm, "") for arm in arms))
    console.print(table)


def _cell(r: Record) -> str:
    interval = f"  [{r.params['interval']}]" if "interval" in r.params else ""
    return f"{r.p50:,.4g} {r.unit}{interval}"


class _Maker:
    """Records that differ only in arm and figure."""

    def __init__(self, question: str, params: dict[str, Any], seed: int, origin: Origin) -> None:
        self._question = question
        self._params = params
        self._seed = seed
        self._origin = origin

    def of(self, arm: str, metric: str, values: Sequence[float], **extra: Any) -> Record:
        base = metric.removesuffix(" ratio").partition(" of ")[0]
        better = "higher" if base in _HIGHER or metric.startswith("link") or "right" in metric else "lower"
        params, better = {**self._params, **extra}, "-" if base in _CONTEXT else better
        return self._origin.record(self._question, arm, params, metric, _unit(metric), better, values, seed=self._seed)

    def share(self, arm: str, metric: str, better: str, values: Sequence[float]) -> Record:
        return self._origin.record(self._question, arm, self._params, metric, "%", better, values, seed=self._seed)

    def ratio(self, arm: str, to: str, name: str, base: Sequence[float], values: Sequence[float]) -> Record:
        r = ratio(base, values)
        return self.of(
            arm,
            f"{name} ratio",
            [v / b for b, v in zip(base, values, strict=True)],
            to=to,
            interval=f"{r.low:.4f}-{r.high:.4f} ({r.coverage:.0%})",
        )


def _identity(make: _Maker, arm: str, runs: Sequence[Trial]) -> list[Record]:
    scores = [t.links for t in runs if t.links is not None]
    made = [make.of(arm, f"link {name}", [getattr(s, name.lower()) for s in scores])
            for name in ("F1", "precision", "recall")]  # fmt: skip
    made.append(make.of(arm, "sessions all right", [
        sum(x.num_right == x.num_turns for x in s.sessions) / max(1, len(s.sessions)) for s in scores
    ]))  # fmt: skip
    children = [[x for x in s.sessions if x.parent_id is not None] for s in scores]
    if all(children):
        share = [sum(bool(x.parent_right) for x in c) / len(c) for c in children]
        made.append(make.of(arm, "parents right", share, children=len(children[0])))
    wrong = [sum(x.parent_right is False and x.parent_id is None for x in s.sessions) for s in scores]
    made.append(make.of(arm, "parents invented", wrong))
    return made


def _unit(metric: str) -> str:
    if metric.endswith(" ratio") or " / " in metric:
        return "x"
    for suffix, unit in (("_per_s", "/s"), ("_per_hour", "/h"), ("_s", "s"), ("_tokens", "tokens")):
        if metric.partition(" of ")[0].endswith(suffix):
            return unit
    return "%" if metric.startswith("share of time") else ""

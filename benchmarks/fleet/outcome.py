"""What a run of an arm came to, and the records of many: medians, and impala over the best of the packaged routers."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.fleet.clients import Waited
from benchmarks.fleet.emulated import Served
from benchmarks.record import Origin, Record
from impala_vllm.replay.comparison import ratio

OURS = "impala"
NO_RIVAL = frozenset({OURS, "sticky"})
"""`sticky` knows what a router is not told."""
QUESTION = "serving/fleet"


class Outcome(NamedTuple):
    """One arm, once."""

    stall_mean_s: float
    tasks_per_hour: float
    hit_ratio: float
    spread: float
    """Prefill seconds of the server with most over the mean."""
    servers_used: int
    failures: int

    @classmethod
    def of(cls, waited: Waited, served: Sequence[Served]) -> "Outcome":
        """From both ends."""
        busy = [one.prefill_s for one in served]
        num_tokens = sum(one.prompt_tokens for one in served)
        return cls(
            statistics.mean(waited.stalls_s),
            3600 * len(waited.stalls_s) / waited.makespan_s,
            sum(one.cached_tokens for one in served) / num_tokens if num_tokens else 0.0,
            max(busy) / statistics.mean(busy) if any(busy) else 0.0,
            sum(one.requests > 0 for one in served),
            waited.num_failures,
        )

    def is_whole(self) -> bool:
        """Every turn was served: one that fails is over at once, so times and rates of others say nothing."""
        return self.failures == 0 and self.servers_used > 0


_KINDS = {
    "stall_mean_s": ("s", "lower"),
    "tasks_per_hour": ("tasks/h", "higher"),
    "hit_ratio": ("share", "higher"),
    "spread": ("ratio", "lower"),
    "servers_used": ("servers", "-"),
    "failures": ("requests", "lower"),
}
_COMPARED = ("stall_mean_s", "tasks_per_hour")
_ALWAYS = frozenset({"servers_used", "failures"})
"""What may be said of an arm that did not serve every turn."""


def best_rival(found: Mapping[str, Sequence[Outcome]], metric: str) -> str | None:
    """The arm that is best at a metric in the median, of those that served every turn; None where there is none."""
    rivals = [name for name, outcomes in found.items() if _is_whole(outcomes) and name not in NO_RIVAL]
    choose = min if _KINDS[metric][1] == "lower" else max
    return choose(rivals, key=lambda name: _median(found[name], metric), default=None)


def ratios(found: Mapping[str, Sequence[Outcome]], metric: str) -> tuple[str, list[float]] | None:
    """Ours over the best rival's, repetition by repetition, and who that is; None where we did not serve every turn."""
    rival = best_rival(found, metric)
    if rival is None or not _is_whole(found.get(OURS, ())):
        return None
    pairs = zip(found[OURS], found[rival], strict=True)
    return rival, [getattr(ours, metric) / getattr(theirs, metric) for ours, theirs in pairs]


def summary(found: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """One JSON line an arm, and one a comparison."""
    lines = [
        json.dumps(
            {"arm": arm, "medians_of": len(outcomes)}
            | ({} if _is_whole(outcomes) else {"compared": "no: it did not serve every turn"})
            | {name: _median(outcomes, name) for name in _KINDS}
        )
        for arm, outcomes in found.items()
        if outcomes
    ]
    for metric in _COMPARED:
        if (compared := ratios(found, metric)) is not None:
            rival, values = compared
            lines.append(json.dumps({"ratio of": metric, "to": rival, "median": statistics.median(values)}))
    return lines


def records(found: Mapping[str, Sequence[Outcome]], params: dict[str, Any], origin: Origin) -> list[Record]:
    """Of every arm and metric; of an arm that did not serve every turn, only how many failed and who was asked."""
    made = [
        origin.record(QUESTION, arm, params, metric, unit, better, [float(getattr(o, metric)) for o in outcomes])
        for arm, outcomes in found.items()
        if outcomes
        for metric, (unit, better) in _KINDS.items()
        if metric in _ALWAYS or _is_whole(outcomes)
    ]
    for metric in _COMPARED:
        if (compared := ratios(found, metric)) is not None:
            rival, values = compared
            r = ratio([1.0] * len(values), values)
            told = {"to": rival, "interval": f"{r.low:.4f}-{r.high:.4f} ({r.coverage:.0%})"}
            better = _KINDS[metric][1]
            made.append(origin.record(QUESTION, OURS, params | told, f"{metric} ratio", "x", better, values))
    return made


def _is_whole(outcomes: Sequence[Outcome]) -> bool:
    return bool(outcomes) and all(outcome.is_whole() for outcome in outcomes)


def _median(outcomes: Sequence[Outcome], metric: str) -> float:
    return statistics.median(getattr(o, metric) for o in outcomes)

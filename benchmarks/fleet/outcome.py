"""What a run of an arm came to, and the records of many: medians, and impala over the best of the packaged routers.

Where an arm has fewer repetitions than ours, or none, every record of the run says so: a ratio is to the best of those
that there are.
"""

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


Found = Mapping[str, Mapping[int, Outcome]]
"""By arm and number of the repetition."""


class Comparison(NamedTuple):
    """Ours over the best rival's."""

    to: str
    values: list[float]
    """A repetition each, of those that both served whole."""


def compared(found: Found, metric: str) -> Comparison | None:
    """Ours to the rival beside which we look worst, in the median; None without one, or where we failed a turn."""
    ours = found.get(OURS, {})
    if len(_whole(ours)) != len(ours):
        return None
    rivals: list[Comparison] = []
    for name, outcomes in found.items():
        if name not in NO_RIVAL and (pairs := [(ours[n], o) for n, o in _whole(outcomes).items() if n in ours]):
            rivals.append(Comparison(name, [getattr(a, metric) / getattr(b, metric) for a, b in pairs]))
    choose = max if _KINDS[metric][1] == "lower" else min
    return choose(rivals, key=lambda rival: statistics.median(rival.values), default=None)


def short(found: Found, faults: Mapping[str, str]) -> str | None:
    """Who is compared and has fewer whole repetitions than others, and why; None: nobody."""
    asked = max(map(len, found.values()), default=0)
    missed: list[str] = []
    for name in {**found, **faults}:
        number = len(_whole(found.get(name, {})))
        if number < asked and (name == OURS or name not in NO_RIVAL):
            missed.append(f"{name}: {number} of {asked}" + (f" ({faults[name]})" if name in faults else ""))
    return "; ".join(missed) or None


def summary(found: Found, faults: Mapping[str, str]) -> list[str]:
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
    less = {"short of": missed} if (missed := short(found, faults)) else {}
    for metric in _COMPARED:
        if (ratios := compared(found, metric)) is not None:
            told = {"to": ratios.to, "of": len(ratios.values), "median": statistics.median(ratios.values)}
            lines.append(json.dumps({"ratio of": metric} | told | less))
    return lines


def records(found: Found, faults: Mapping[str, str], params: dict[str, Any], origin: Origin) -> list[Record]:
    """Of every arm and metric; of an arm that did not serve every turn, only how many failed and who was asked."""
    if missed := short(found, faults):
        params = params | {"short of": missed}
    made = [
        origin.record(
            QUESTION, arm, params, metric, unit, better, [float(getattr(o, metric)) for o in outcomes.values()]
        )
        for arm, outcomes in found.items()
        if outcomes
        for metric, (unit, better) in _KINDS.items()
        if metric in _ALWAYS or _is_whole(outcomes)
    ]
    for metric in _COMPARED:
        if (ratios := compared(found, metric)) is not None:
            r = ratio([1.0] * len(ratios.values), ratios.values)
            told = {"to": ratios.to, "interval": f"{r.low:.4f}-{r.high:.4f} ({r.coverage:.0%})"}
            better = _KINDS[metric][1]
            made.append(origin.record(QUESTION, OURS, params | told, f"{metric} ratio", "x", better, ratios.values))
    return made


def _whole(outcomes: Mapping[int, Outcome]) -> dict[int, Outcome]:
    return {number: outcome for number, outcome in outcomes.items() if outcome.is_whole()}


def _is_whole(outcomes: Mapping[int, Outcome]) -> bool:
    return bool(outcomes) and len(_whole(outcomes)) == len(outcomes)


def _median(outcomes: Mapping[int, Outcome], metric: str) -> float:
    return statistics.median(getattr(o, metric) for o in outcomes.values())

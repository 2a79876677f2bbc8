"""By how much a policy is better than its baseline, as papers say it: shorter jobs, more throughput, more load."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter

from impala_vllm.replay.measures import mean
from impala_vllm.sim.simulation import Outcome

RATES = tuple(0.1 * 2 ** (i / 2) for i in range(13))
"""Programs a second at which load is tried: 0.1 to 6.4."""
PATIENCE = 3.0
"""How many times as long as on a server that is nearly idle a token may take."""


def faster(base: Outcome, policy: Outcome) -> float:
    """By completion times."""
    return base.measures.jct_mean_s / policy.measures.jct_mean_s


def sooner(base: Outcome, policy: Outcome) -> float:
    """By what servers take of them."""
    return base.measures.stall_mean_s / policy.measures.stall_mean_s


def more(base: Outcome, policy: Outcome) -> float:
    """By tasks an hour."""
    return policy.measures.tasks_per_hour / base.measures.tasks_per_hour


def token_s(outcome: Outcome) -> float:
    """Mean over programs of completion time by output tokens."""
    turns = sorted(outcome.served, key=attrgetter("root_id"))
    found: list[float] = []
    for _, group in groupby(turns, key=attrgetter("root_id")):
        mine = list(group)
        jct_s = max(t.end_s for t in mine) - min(t.start_s for t in mine)
        found.append(jct_s / sum(t.output_tokens for t in mine))
    return mean(found)


def sustained(latency_s: Callable[[float], float], limit_s: float, rates: Sequence[float] = RATES) -> float:
    """The rate at which latency passes the limit first, between two of `rates` by its logarithm; or the last one.

    It holds the limit at the first of them.
    """
    before, before_s = rates[0], latency_s(rates[0])
    for rate in rates[1:]:
        now_s = latency_s(rate)
        if now_s > limit_s:
            share = math.log(limit_s / before_s) / math.log(now_s / before_s)
            return before * (rate / before) ** share
        before, before_s = rate, now_s
    return rates[-1]

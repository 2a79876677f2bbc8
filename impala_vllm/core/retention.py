"""What idle KV is worth, and so whose blocks go first when room is needed.

Value of a trace's chain per block: seconds of recompute it saves, over blocks and over the expected wait
for it. Dead chains (superseded, ended, unknown) are worth nothing; the chain of a turn that is waiting is
worth most. Shared stems are not scored: the eviction queue gives them last.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from impala_vllm.core.cost import StepCost

SOONEST_S = 0.05
"""Waits shorter than this are all alike: a few engine steps."""


@dataclass(frozen=True, slots=True)
class RetentionConfig:
    """Switches, for comparison."""

    enabled: bool = True
    """Evict by value; off: the trace that was silent longest goes first."""
    supersede: bool = True
    """What a turn no longer uses of its trace's KV goes first, in HBM and below; off: it stays with its trace."""


class Holding(NamedTuple):
    """KV blocks of one trace that nobody references."""

    num_tokens: int
    """Tokens a resume would compute again if all of it were gone."""
    wait_s: float | None
    """Median wait for the resume; None: it is not expected."""
    is_waiting: bool = False
    """Its next turn has arrived and waits."""
    idle_since_s: float | None = None
    back_s: float | None = None
    """Seconds to get it back where a tier below has it; None: it would be computed again."""


class Retention:
    """Scores holdings; the eviction queue keeps them in order."""

    def __init__(self, cost: StepCost, config: RetentionConfig | None = None) -> None:
        self.config = config or RetentionConfig()
        self._cost = cost

    def value(self, holding: Holding) -> float:
        """Seconds saved per token and second of waiting; 0 for what nobody will ask for."""
        if not self.config.enabled:
            return math.inf if holding.is_waiting else holding.idle_since_s or 0.0
        back_s = self._cost.prefill_s(holding.num_tokens) if holding.back_s is None else holding.back_s
        per_token_s = back_s / max(1, holding.num_tokens)
        if holding.is_waiting:
            return per_token_s / SOONEST_S
        if holding.wait_s is None:
            return 0.0
        return per_token_s / max(SOONEST_S, holding.wait_s)

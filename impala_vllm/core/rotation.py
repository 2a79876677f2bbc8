"""Which waiting turns are judged again in a step.

What a turn asks for changes slowly, so in a long queue only those that stand first and the others in rotation are;
a short queue, or one whose prices have changed, is judged as a whole.
"""

from collections.abc import Sequence
from typing import TypeVar

from impala_vllm.core.cost import StepCost

MAX_JUDGED = 4
"""Turns judged again in a step: some 40 us in an engine. A queue no longer than this is judged anew each time."""

PRICED_TOKENS, PRICE_TOLERANCE = 2048, 0.1
"""When a prefill of so many tokens costs so much more or less than it did, old judgements compare no more."""

T = TypeVar("T")


class Rotation:
    """Where the rotation stands, and the price of the last full round."""

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._at = 0
        self._price_s = 0.0

    def due(self, ranked: Sequence[T], num_waiting: int) -> Sequence[T] | None:
        """Those of `ranked`, best first, that are judged again; None: everybody. O(`MAX_JUDGED`)."""
        price_s = self._cost.prefill_s(PRICED_TOKENS) + self._cost.decode_s
        has_changed = abs(price_s - self._price_s) > PRICE_TOLERANCE * self._price_s
        if has_changed:
            self._price_s = price_s
        if has_changed or num_waiting <= MAX_JUDGED:
            return None
        half = MAX_JUDGED // 2
        self._at = self._at + half if self._at + half < len(ranked) else 0
        return [*ranked[:half], *ranked[self._at : self._at + half]]

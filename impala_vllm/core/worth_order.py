"""Traces by what their KV in a tier is worth, cheapest first.

Worth changes as time passes and sorting is dear: an order is good for a round, in which only the traces whose turns
came or went are put in their place anew.
"""

from bisect import insort
from collections.abc import Callable, Collection
from operator import itemgetter

from impala_vllm.core.types import TraceId

ROUND = 256
"""Victims after which everything is put in order anew: what traces are worth has changed by then."""


class WorthOrder:
    """Kept for one tier. One writer."""

    def __init__(self, worth: Callable[[TraceId], float]) -> None:
        self.worth = worth
        self._order: list[tuple[float, TraceId]] | None = None
        self._changed: dict[TraceId, None] = {}
        self._num_chosen = 0

    def changed(self, trace_id: TraceId) -> None:
        """A turn of the trace came or went, or its first chunks came in."""
        self._changed[trace_id] = None

    def chose(self, num_victims: int) -> None:
        """So many chunks were named since."""
        self._num_chosen += num_victims

    def reset(self) -> None:
        """Everything is worth something else."""
        self._order = None

    def cheapest_first(self, traces: Collection[TraceId]) -> list[tuple[float, TraceId]]:
        """Worth and trace. O(traces) where turns came or went, O(traces log traces) once a round.

        Of `traces` all are in it; so may be some that no longer are.
        """
        if self._order is None or self._num_chosen >= ROUND:
            self._order = sorted(((self.worth(t), t) for t in traces), key=itemgetter(0))
            self._num_chosen = 0
        elif self._changed:
            self._order = [entry for entry in self._order if entry[1] not in self._changed]
            for trace_id in self._changed:
                if trace_id in traces:
                    insort(self._order, (self.worth(trace_id), trace_id), key=itemgetter(0))
        self._changed.clear()
        return self._order

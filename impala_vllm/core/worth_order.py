"""Traces by what their KV in a tier is worth, cheapest first.

Worth changes as time passes and sorting is dear: an order is good for a round, in which only the traces whose turns
came or went are put in their place anew.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Collection
from itertools import count
from typing import TypeAlias

from impala_vllm.core.types import TraceId

ROUND = 256
"""Victims after which everything is put in order anew, or as many as there are traces: what they are worth has
changed by then."""

Entry: TypeAlias = tuple[float, int, TraceId]
"""Worth, a number of its own, trace."""


class WorthOrder:
    """Kept for one tier. One writer."""

    def __init__(self, worth: Callable[[TraceId], float]) -> None:
        self.worth = worth
        self._order: list[Entry] | None = None
        self._entries: dict[TraceId, Entry] = {}
        """What is in the order."""
        self._changed: dict[TraceId, None] = {}
        self._num_chosen = 0
        self._numbers = count()

    def changed(self, trace_id: TraceId) -> None:
        """A turn of the trace came or went, or its first chunks came in."""
        self._changed[trace_id] = None

    def chose(self, num_victims: int) -> None:
        """So many chunks were named since."""
        self._num_chosen += num_victims

    def reset(self) -> None:
        """Everything is worth something else."""
        self._order = None

    def cheapest_first(self, traces: Collection[TraceId]) -> list[Entry]:
        """Of `traces` all but those that `skip_first` left out, and maybe some that no longer are.

        O(log traces) for each whose turn came or went, O(traces log traces) once a round.
        """
        if self._order is None or self._num_chosen >= max(ROUND, len(traces)):
            worths = dict(zip(traces, map(self.worth, traces), strict=True))
            ordered = sorted(worths, key=worths.__getitem__)  # numbers alone are sorted quicker than entries
            self._order = list(zip(map(worths.__getitem__, ordered), self._numbers, ordered, strict=False))
            self._entries = dict(zip(ordered, self._order, strict=True))
            self._num_chosen = 0
        else:
            for trace_id in self._changed:
                entry = self._entries.pop(trace_id, None)
                if entry is not None:
                    del self._order[bisect_left(self._order, entry)]
                if trace_id in traces:
                    entry = self._entries[trace_id] = (self.worth(trace_id), next(self._numbers), trace_id)
                    insort(self._order, entry)
        self._changed.clear()
        return self._order

    def skip_first(self, num: int) -> None:
        """The cheapest `num` have nothing here until they are `changed`: leave them out."""
        if num and self._order is not None:
            for _, _, trace_id in self._order[:num]:
                self._entries.pop(trace_id, None)
            del self._order[:num]

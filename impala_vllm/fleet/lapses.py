"""Ends that nobody tells of: what was counted as under way is taken off again when it should be over."""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count

from impala_vllm.fleet.scoring import Load

_NUM_LEFT = 64
"""Entries that are not worth looking for ended ones."""


@dataclass(slots=True)
class Prefill:
    """Of one turn, in its replica's queue until it begins to answer. Small: its turn may have ended long before it."""

    load: Load
    seconds: float
    """Expected; what the replica's queue was lengthened by."""
    is_over: bool = False
    """Or taken for over: no queue is longer by it."""

    def end(self) -> None:
        """Idempotent."""
        if not self.is_over:
            self.is_over = True
            self.load.answer(self.seconds)


class Lapses:
    """Used on one thread."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Prefill, Callable[[], None] | None]] = []
        self._numbers = count()
        self._sweep_at = _NUM_LEFT

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, due_s: float, prefill: Prefill, then: Callable[[], None] | None = None) -> None:
        """End it at the first look from then on, and call `then`, unless it has ended by then. O(log n) on average."""
        heappush(self._heap, (due_s, next(self._numbers), prefill, then))
        if len(self._heap) > self._sweep_at:
            self._heap = [entry for entry in self._heap if not entry[2].is_over]
            heapify(self._heap)
            self._sweep_at = 2 * len(self._heap) + _NUM_LEFT

    def look(self, now: float) -> None:
        """Call before anything is decided by what is counted, and now and then."""
        while self._heap and self._heap[0][0] <= now:
            _, _, prefill, then = heappop(self._heap)
            if not prefill.is_over:
                prefill.end()
                if then is not None:
                    then()

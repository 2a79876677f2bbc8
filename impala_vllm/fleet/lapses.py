"""Ends that nobody tells of: what was counted as under way is taken off again when it should be over."""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count


class Lapses:
    """Used on one thread."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def add(self, due_s: float, end: Callable[[], None]) -> None:
        """Call `end` at the first look from then on. O(log n)."""
        heappush(self._heap, (due_s, next(self._numbers), end))

    def look(self, now: float) -> None:
        """Call before anything is decided by what is counted, and now and then."""
        while self._heap and self._heap[0][0] <= now:
            heappop(self._heap)[2]()

"""Virtual time: calls in order of when they are due, at equal times in the order they were asked for."""

import heapq
from collections.abc import Callable


class Loop:
    """One simulation's clock. Nothing here is random: the same calls give the same run."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._num_asked = 0

    def at(self, when_s: float, call: Callable[[], None]) -> None:
        """Have `call` made at `when_s`; times that have passed are now."""
        self._num_asked += 1
        heapq.heappush(self._due, (max(when_s, self.now), self._num_asked, call))

    def run(self) -> None:
        """Until nothing is due any more."""
        due = self._due
        while due:
            self.now, _, call = heapq.heappop(due)
            call()

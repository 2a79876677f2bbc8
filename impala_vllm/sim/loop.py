"""Virtual time: calls in order of when they are due, at equal times in the order they were asked for."""

import heapq
from collections.abc import Callable

PATIENCE_S = 3600.0
"""Far longer than any policy lets a turn wait that nothing but time keeps back."""


class Loop:
    """One simulation's clock. Nothing here is random: the same calls give the same run."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None], str | None]] = []
        self._num_asked = 0
        self._num_events = 0
        """Of what is due, what is more than being asked again."""
        self._moved_s = 0.0
        """When something happened, or was due to."""

    def at(self, when_s: float, call: Callable[[], None]) -> None:
        """Have `call` made at `when_s`; times that have passed are now."""
        self._num_events += 1
        self._add(when_s, call, None)

    def again(self, when_s: float, call: Callable[[], None], who: str) -> None:
        """The same where `who` has let nothing happen and is asked once more.

        Raises AssertionError from `run` once nothing else is due for `PATIENCE_S`: it would go on for ever.
        """
        self._add(when_s, call, who)

    def run(self) -> None:
        """Until nothing is due any more."""
        due = self._due
        while due:
            self.now, _, call, who = heapq.heappop(due)
            if who is None:
                self._num_events -= 1
                self._moved_s = self.now
            elif self._num_events:
                self._moved_s = self.now
            elif self.now - self._moved_s > PATIENCE_S:
                raise AssertionError(f"{who} lets nobody start, and nothing else is due for {PATIENCE_S:,.0f} s")
            call()

    def _add(self, when_s: float, call: Callable[[], None], who: str | None) -> None:
        self._num_asked += 1
        heapq.heappush(self._due, (max(when_s, self.now), self._num_asked, call, who))

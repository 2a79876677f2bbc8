"""Tool time along a task's critical path: what of the time to its end no server can change."""


class ToolTime:
    """One session's: its task's until it was launched, and since then its own.

    While it waits for a child, the child's path is its own; what the child's tools took before that is not.
    """

    __slots__ = ("_spans", "total_s")

    def __init__(self, before_s: float = 0.0) -> None:
        """`before_s`: what lies on the path to its launch."""
        self.total_s = before_s
        self._spans: list[tuple[float, float]] = []
        """How long, until when; one after the other."""

    def add(self, length_s: float, end_s: float) -> None:
        """A tool has run for so long."""
        self.total_s += length_s
        self._spans.append((length_s, end_s))

    def wait_for(self, child: "ToolTime", since_s: float) -> None:
        """It did nothing since `since_s` but wait for `child`, which has ended."""
        for length_s, end_s in child._spans:
            if end_s > since_s:
                self.add(min(length_s, end_s - since_s), end_s)

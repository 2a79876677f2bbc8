"""Is the engine moving: steps, progress, and since when it should have been.

All times are the engine process's monotonic clock; only ages leave the process.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Heartbeat:
    """What the scheduler has done lately. One writer: the engine loop."""

    num_steps: int = 0
    last_step_s: float | None = None
    last_progress_s: float | None = None
    """The last step that computed a token."""
    busy_since_s: float | None = None
    """Since when there has been unfinished work; None while idle."""

    def beat(self, num_tokens: int, now: float) -> None:
        """A step finished that had scheduled `num_tokens`."""
        self.num_steps += 1
        self.last_step_s = now
        if num_tokens > 0:
            self.last_progress_s = now

    def note_work(self, num_unfinished: int, now: float) -> None:
        """Work came or went; `num_unfinished` requests are left."""
        if num_unfinished == 0:
            self.busy_since_s = None
        elif self.busy_since_s is None:
            self.busy_since_s = now

    def stuck_s(self, now: float) -> float:
        """For how long there has been work and no progress; 0 while idle."""
        if self.busy_since_s is None:
            return 0.0
        return max(0.0, now - max(self.busy_since_s, self.last_progress_s or 0.0))

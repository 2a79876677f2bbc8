"""Whether a disk is worth asking. Pure: `now` is an argument."""

import math


class Breaker:
    """A circuit breaker: opens on trouble, waits, closes when a probe succeeds.

    Open: nothing is to be started, except a probe when one is due.
    """

    def __init__(self, max_consecutive_errors: int, cooldown_s: float, max_cooldown_s: float) -> None:
        self.is_open = False
        self.is_dead = False
        """Open for good."""
        self._max_consecutive_errors = max_consecutive_errors
        self._first_cooldown_s = cooldown_s
        self._max_cooldown_s = max_cooldown_s
        self._cooldown_s = cooldown_s
        self._num_errors = 0
        self._closed_s: float | None = None
        self._probe_s = math.inf

    def succeed(self) -> None:
        """Something worked."""
        self._num_errors = 0

    def fail(self, now: float) -> bool:
        """Something did not. Returns whether this opened the breaker."""
        self._num_errors += 1
        return self._num_errors >= self._max_consecutive_errors and self.trip(now)

    def trip(self, now: float) -> bool:
        """Open. Returns False where it was open.

        The cool-down doubles where the breaker was closed for less time than it had been open, else it starts afresh.
        """
        if self.is_open:
            return False
        if self._closed_s is not None and now - self._closed_s < self._cooldown_s:
            self._cooldown_s = min(2.0 * self._cooldown_s, self._max_cooldown_s)
        else:
            self._cooldown_s = self._first_cooldown_s
        self.is_open = True
        self._probe_s = now + self._cooldown_s
        return True

    def kill(self) -> None:
        """Open for good."""
        self.is_open = self.is_dead = True
        self._probe_s = math.inf

    def probe_in_s(self, now: float) -> float:
        """Seconds until a probe is due, 0.0: now; `math.inf` where none is coming."""
        return max(0.0, self._probe_s - now)

    def start_probe(self) -> None:
        """A probe is under way; its owner says how it ended."""
        self._probe_s = math.inf

    def end_probe(self, is_well: bool, now: float) -> None:
        """Close, or wait twice as long as before."""
        if self.is_dead:
            return
        if is_well:
            self.is_open = False
            self._num_errors = 0
            self._closed_s = now
        else:
            self._cooldown_s = min(2.0 * self._cooldown_s, self._max_cooldown_s)
            self._probe_s = now + self._cooldown_s

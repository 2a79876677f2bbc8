"""Byte rates: a cap on how many may start, and a measure of how many the disk moves. Pure: `now` is an argument."""

import math


class TokenBucket:
    """A cap in bytes a second over any time much longer than `burst_s`."""

    def __init__(self, bytes_per_s: float | None, now: float, burst_s: float = 0.1) -> None:
        self.bytes_per_s = bytes_per_s
        """None: no cap."""
        self._burst_bytes = burst_s * bytes_per_s if bytes_per_s is not None else 0.0
        self._balance_bytes = self._burst_bytes
        self._filled_s = now

    def ready_in_s(self, now: float) -> float:
        """Seconds until something may start, 0.0: now; `math.inf` where the cap is 0."""
        if self.bytes_per_s is None:
            return 0.0
        self._fill(now)
        if self._balance_bytes > 0.0:
            return 0.0
        # A byte more than nothing, or rounding may leave it at nothing for ever.
        return (1.0 - self._balance_bytes) / self.bytes_per_s if self.bytes_per_s else math.inf

    def take(self, num_bytes: int, now: float) -> None:
        """Something of any size starts, `ready_in_s` being 0; a large one is paid for afterwards."""
        if self.bytes_per_s is not None:
            self._fill(now)
            self._balance_bytes -= num_bytes

    def _fill(self, now: float) -> None:
        assert self.bytes_per_s is not None
        earned = max(0.0, now - self._filled_s) * self.bytes_per_s
        self._balance_bytes = min(self._burst_bytes, self._balance_bytes + earned)
        self._filled_s = max(now, self._filled_s)


class Meter:
    """Bytes a second while anything is in flight, smoothed: what the disk can do, not what was asked of it."""

    def __init__(self, window_s: float = 0.1, weight: float = 0.2) -> None:
        self.bytes_per_s: float | None = None
        """None: nothing was moved yet."""
        self._window_s = window_s
        """Busy time that one sample covers: single small ops hardly count."""
        self._weight = weight
        self._num_in_flight = 0
        self._since_s = 0.0
        self._busy_s = 0.0
        self._num_bytes = 0
        self._is_first = True

    def start(self, now: float) -> None:
        """An op is in flight."""
        if not self._num_in_flight:
            self._since_s = now
        self._num_in_flight += 1

    def finish(self, num_bytes: int, now: float) -> None:
        """An op is done; 0 bytes where it failed."""
        self._num_in_flight -= 1
        self._busy_s += max(0.0, now - self._since_s)
        self._since_s = now
        self._num_bytes += num_bytes
        if self._busy_s <= 0.0 or not self._num_bytes:
            return
        sample = self._num_bytes / self._busy_s
        is_whole = self._busy_s >= self._window_s
        if self.bytes_per_s is None or self._is_first:
            self.bytes_per_s = sample  # not a whole window yet, but better than nothing
            self._is_first = not is_whole
        elif is_whole:
            self.bytes_per_s += self._weight * (sample - self.bytes_per_s)
        if is_whole:
            self._busy_s, self._num_bytes = 0.0, 0

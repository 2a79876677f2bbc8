"""How fast bytes move between two tiers, measured, and how long what was asked for will take."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """Priors of a link's speed, replaced by what is measured."""

    bytes_per_s: float
    memory: float = 20.0
    """Transfers after which an observation's weight has fallen to 1/e."""


class Link:
    """One direction between two tiers. One writer; O(1)."""

    def __init__(self, config: LinkConfig) -> None:
        self.bytes_per_s = config.bytes_per_s
        self.queued_bytes = 0
        """Asked for and not there yet."""
        self._memory = config.memory
        self._num_seen = 0

    def observe(self, num_bytes: int, seconds: float) -> None:
        """A transfer took `seconds`, waiting in the queue not counted."""
        if num_bytes <= 0 or seconds <= 0.0:
            return
        self._num_seen += 1
        weight = max(1.0 / self._num_seen, 1.0 / self._memory)
        # Means of seconds a byte, not of bytes a second: what is asked for is time.
        per_byte_s = (1.0 - weight) / self.bytes_per_s + weight * seconds / num_bytes
        self.bytes_per_s = 1.0 / per_byte_s

    def seconds(self, num_bytes: int) -> float:
        """To move so much, with nothing in front of it."""
        return num_bytes / self.bytes_per_s

    def wait_s(self) -> float:
        """Until what is queued now has arrived."""
        return self.queued_bytes / self.bytes_per_s

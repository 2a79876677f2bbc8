"""Bounds of the NVMe tier's traffic. Fixed on purpose: what the disk does is measured, what it may do is not."""

from dataclasses import dataclass

STAGING_SHARE = 4
"""What waits to be written stays where it is: no more than one part in so many of the memory that it lies in."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a store may have at the disk, waiting, and per second; when it stops asking."""

    depth: int = 16
    """Ops at the disk. Enough to keep an NVMe drive busy with ops of a few hundred KiB."""
    max_in_flight: int = 20
    """Ops that the engine has. Those beyond `depth` wait in it, and one of them starts where another is done, before
    anybody has looked at that one."""
    max_writes_in_flight: int = 4
    """Of these, writes: a read that comes finds the rest free."""
    max_queued_write_bytes: int = 1 << 30
    """Data of writes that wait or move; a write over it is not taken."""
    read_bytes_per_s: float | None = None
    """Cap; None: none."""
    write_bytes_per_s: float | None = None
    """Cap; None: none."""
    stuck_s: float = 5.0
    """A read in flight for longer means the disk hangs; a healthy one answers within milliseconds."""
    max_consecutive_errors: int = 8
    """Then the store is left alone."""
    cooldown_s: float = 30.0
    """From then to the first probe; doubles with every probe that fails."""
    max_cooldown_s: float = 600.0


def staging_bytes(memory_bytes: int, item_bytes: int) -> int:
    """How much of a memory may wait to be written; an item of it always may."""
    return max(item_bytes, memory_bytes // STAGING_SHARE)

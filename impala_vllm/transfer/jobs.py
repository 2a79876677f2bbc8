"""Jobs of the NVMe store and the order in which their items start. Pure: `now` is an argument."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Item(NamedTuple):
    """One key's data and its place."""

    key: bytes
    slot: int
    buffer: memoryview
    """At most a slot's bytes; a multiple of the engine's alignment in address and length."""
    parent: bytes | None = None
    """To be written: the key without which this one is of no use; None: there is none."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a job; every key is in one of the three, in the order in which they ended."""

    job_id: int
    is_write: bool
    done_keys: tuple[bytes, ...]
    """Written, or read and verified."""
    failed_keys: tuple[bytes, ...]
    """Tried in vain: the slot no longer holds the key."""
    untried_keys: tuple[bytes, ...]
    """Not tried, by `cancel`, `clear`, an open breaker or the end: the slot holds what it held."""
    num_bytes: int
    """Moved for `done_keys`."""
    seconds: float
    """From the first item's start to the last one's end; 0.0 when none was tried."""

    @property
    def cancelled(self) -> bool:
        """Whether a part of it was not tried."""
        return bool(self.untried_keys)


@dataclass(slots=True, eq=False)
class Job:
    """A job on its way. Written by the coordinator, but for `is_withdrawn`; the engine's thread reads numbers."""

    job_id: int
    is_write: bool
    items: Sequence[Item]
    staged_bytes: int = 0
    """Data of a write, which counts against the staging budget until its result is polled."""
    serial: int = 0
    """Place among all that was submitted, `forget` included."""
    is_withdrawn: bool = False
    """What has not started is not to start."""
    num_started: int = 0
    num_in_flight: int = 0
    started_s: float = 0.0
    num_bytes: int = 0
    left_bytes: int = field(init=False)
    """Data of items that have not ended."""
    done_keys: list[bytes] = field(default_factory=list)
    failed_keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left_bytes = sum(item.buffer.nbytes for item in self.items)

    @property
    def has_waiting(self) -> bool:
        """Whether an item is still to start."""
        return self.num_started < len(self.items) and not self.is_withdrawn

    def begin(self, now: float) -> None:
        """The next item starts."""
        if not self.num_started:
            self.started_s = now
        self.num_started += 1
        self.num_in_flight += 1

    def end(self, item: Item, is_done: bool) -> None:
        """A started item is over."""
        self.num_in_flight -= 1
        self.left_bytes -= item.buffer.nbytes
        if is_done:
            self.num_bytes += item.buffer.nbytes
        (self.done_keys if is_done else self.failed_keys).append(item.key)

    def give_up(self) -> None:
        """Whatever started and did not end is over."""
        ended = {*self.done_keys, *self.failed_keys}
        self.failed_keys += [item.key for item in self.items[: self.num_started] if item.key not in ended]
        self.num_in_flight = 0

    def result(self, now: float) -> Result:
        """What became of it, nothing being in flight."""
        assert not self.num_in_flight
        return Result(
            self.job_id,
            self.is_write,
            tuple(self.done_keys),
            tuple(self.failed_keys),
            tuple(item.key for item in self.items[self.num_started :]),
            self.num_bytes,
            now - self.started_s if self.num_started else 0.0,
        )


class JobQueue:
    """Jobs with items to start: reads, then writes.

    A job leaves by itself when its last item has started or it is withdrawn.
    """

    def __init__(self) -> None:
        self._reads: deque[Job] = deque()
        self._writes: deque[Job] = deque()

    def add(self, job: Job) -> None:
        """Behind those of its kind."""
        (self._writes if job.is_write else self._reads).append(job)

    def next_read(self) -> Job | None:
        """The job whose next item is the next read to start; it stays in the queue."""
        return _first(self._reads)

    def next_write(self) -> Job | None:
        """The job whose next item is the next write to start; it stays in the queue."""
        return _first(self._writes)


def _first(jobs: deque[Job]) -> Job | None:
    while jobs and not jobs[0].has_waiting:
        jobs.popleft()
    return jobs[0] if jobs else None

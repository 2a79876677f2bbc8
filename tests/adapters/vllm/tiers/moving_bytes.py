"""Host memory, a worker and a disk in virtual time that really move bytes, and notice when one touches another's.

A chunk's bytes are made from its key. A slot on its way is full of noise until its job is done, and what a job reads
has to be the same at its end as it was at its start.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from impala_vllm.core.allocator import Key
from impala_vllm.transfer.counters import Counters
from impala_vllm.transfer.jobs import Item, Result
from impala_vllm.transfer.limits import Limits
from impala_vllm.transfer.slab_records import Records

CHUNK_BYTES = 16


def content(key: Key) -> bytes:
    """What the model computes for a chunk."""
    return random.Random(key).randbytes(CHUNK_BYTES)


class Host:
    """Slots of host memory."""

    def __init__(self, num_slots: int) -> None:
        self._bytes = bytearray(num_slots * CHUNK_BYTES)

    def row(self, slot: int) -> memoryview:
        return memoryview(self._bytes)[slot * CHUNK_BYTES : (slot + 1) * CHUNK_BYTES]

    def holds(self, slot: int, key: Key) -> bool:
        return self.row(slot) == content(key)


@dataclass
class WorkerJob:
    """A store into host slots, or a load from them."""

    is_store: bool
    slots: dict[Key, int]


class Worker:
    """Between HBM and host. Whoever started a job ends it."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def start(self, is_store: bool, keys: Sequence[Key], slots: Iterable[int]) -> WorkerJob:
        job = WorkerJob(is_store, dict(zip(keys, (int(s) for s in slots), strict=True)))
        for key, slot in job.slots.items():
            if is_store:
                self.host.row(slot)[:] = random.Random(slot).randbytes(CHUNK_BYTES)
            else:
                assert self.host.holds(slot, key), "a load of something else"
        return job

    def end(self, job: WorkerJob) -> None:
        for key, slot in job.slots.items():
            if job.is_store:
                self.host.row(slot)[:] = content(key)
            else:
                assert self.host.holds(slot, key), "a slot was filled anew while it was read"


@dataclass
class DiskJob:
    """One of the store's, and what its buffers held when it came."""

    job_id: int
    is_write: bool
    items: Sequence[Item]
    held: list[bytes]
    start_s: float
    end_s: float
    num_tried: int


class Disk:
    """Stands for `NvmeStore`: a job takes `seconds` and is over when the test's clock says so."""

    def __init__(self, num_slots: int, clock: Callable[[], float], seconds: float = 0.1) -> None:
        self.slots: list[tuple[Key, bytes] | None] = [None] * num_slots
        self.records = Records(num_slots, seed=0)
        self.is_open = False
        self.is_full = False
        """Writes are refused."""
        self.fails: Callable[[Key], bool] = lambda key: False
        self.limits = Limits()
        self.counters = Counters()
        self.read_bytes_per_s: float | None = None
        self.write_bytes_today = self.write_bytes_ever = 0
        self.num_cancelled = 0
        self.num_refused = 0
        self.is_closed = False
        self._clock, self._seconds = clock, seconds
        self._jobs: list[DiskJob] = []

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    @property
    def queued_read_bytes(self) -> int:
        return sum((j.num_tried - self._num_over(j)) * CHUNK_BYTES for j in self._jobs if not j.is_write)

    @property
    def queued_write_bytes(self) -> int:
        return sum(CHUNK_BYTES * len(job.items) for job in self._jobs if job.is_write)

    def submit_write(self, job_id: int, items: Sequence[Item]) -> bool:
        is_over = self.queued_write_bytes + CHUNK_BYTES * len(items) > self.limits.max_queued_write_bytes
        if self.is_full or self.is_open or is_over:
            self.num_refused += 1
            return False
        for item in items:
            self.slots[item.slot] = None
        self._start(job_id, True, items, [bytes(i.buffer) for i in items])
        return True

    def submit_read(self, job_id: int, items: Sequence[Item]) -> None:
        for item in items:
            item.buffer[:] = random.Random(item.slot).randbytes(CHUNK_BYTES)
        self._start(job_id, False, items, [b"" for _ in items])

    def cancel(self, job_id: int) -> bool:
        job = next(job for job in self._jobs if job.job_id == job_id)
        assert not job.is_write
        job.num_tried, job.end_s = self._num_over(job), self._clock()
        self.num_cancelled += 1
        return job.num_tried < len(job.items)

    def forget(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.slots[slot] = None
            self.records.drop(slot)

    def clear(self) -> None:
        self.slots = [None] * len(self.slots)
        self.records = Records(len(self.slots), seed=0)

    def poll(self) -> list[Result]:
        due = [job for job in self._jobs if job.end_s <= self._clock()]
        self._jobs = [job for job in self._jobs if job.end_s > self._clock()]
        return [self._end(job) for job in due]

    def close(self) -> None:
        self.is_closed = True

    def _start(self, job_id: int, is_write: bool, items: Sequence[Item], held: list[bytes]) -> None:
        now = self._clock()
        self._jobs.append(DiskJob(job_id, is_write, items, held, now, now + self._seconds, len(items)))

    def _num_over(self, job: DiskJob) -> int:
        share = (self._clock() - job.start_s) / self._seconds if self._seconds else 1.0
        return min(job.num_tried, int(share * len(job.items)))

    def _end(self, job: DiskJob) -> Result:
        done: list[Key] = []
        failed: list[Key] = []
        untried = [item.key for item in job.items[job.num_tried :]]
        is_write = job.is_write
        for item, held in list(zip(job.items, job.held, strict=True))[: job.num_tried]:
            if self.is_open:
                untried.append(item.key)
            elif is_write:
                assert bytes(item.buffer) == held, "a slot was filled anew while it was written"
                is_done = not self.fails(item.key)
                (done if is_done else failed).append(item.key)
                self.slots[item.slot] = (item.key, held) if is_done else None
                self.records.drop(item.slot)
                if is_done:
                    self.records.put(item.slot, item.key, CHUNK_BYTES, 0, item.parent)
            else:
                found = self.slots[item.slot]
                if found is None or found[0] != item.key or self.fails(item.key):
                    failed.append(item.key)
                else:
                    item.buffer[:] = found[1]
                    done.append(item.key)
        num_bytes = CHUNK_BYTES * len(done)
        self.counters.write_bytes += num_bytes * is_write
        self.counters.read_bytes += num_bytes * (not is_write)
        return Result(job.job_id, is_write, tuple(done), tuple(failed), tuple(untried), num_bytes, self._seconds)

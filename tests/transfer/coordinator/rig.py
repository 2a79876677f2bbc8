"""A coordinator that is stepped by hand: in virtual time, on a real slab."""

import random
from collections.abc import Callable
from pathlib import Path

from impala_vllm.transfer.coordinator import Coordinator
from impala_vllm.transfer.jobs import Item, Job, Result
from impala_vllm.transfer.limits import Limits
from impala_vllm.transfer.messages import Forget, Message
from impala_vllm.transfer.slab import Slab
from tests.transfer.virtual import ManualClock, VirtualDisk

SLOT_BYTES = 10_000


class Rig:
    """A coordinator that is stepped by hand."""

    def __init__(self, directory: Path, limits: Limits) -> None:
        self.clock = ManualClock()
        self.slab = Slab.open(directory, 4 << 20, SLOT_BYTES, "a")
        self.disk = VirtualDisk(self.slab.fd, self.clock)
        self.coordinator = Coordinator(self.slab, self.disk, limits, self.clock, today=lambda: 20_000)
        self.results: dict[int, Result] = {}
        self.finished_s: dict[int, float] = {}
        self._serial = 0

    def tell(self, message: Message) -> None:
        self.coordinator.inbox.append(message)

    def submit(self, job_id: int, is_write: bool, slots: range | list[int]) -> Job:
        items = [Item(key_of(slot), slot, memoryview(bytearray(data_of(slot) if is_write else b""))) for slot in slots]
        if not is_write:
            items = [item._replace(buffer=memoryview(bytearray(SLOT_BYTES))) for item in items]
        self._serial += 1
        job = Job(job_id, is_write, tuple(items), serial=self._serial)
        self.tell(job)
        return job

    def forget(self, *slots: int) -> None:
        """Without slots: all."""
        self._serial += 1
        self.tell(Forget(slots or None, self._serial))

    def step(self, max_wait_s: float = 60.0) -> None:
        self.coordinator.step(max_wait_s)
        while self.coordinator.results:
            result = self.coordinator.results.popleft()
            assert result.job_id not in self.results
            self.results[result.job_id] = result
            self.finished_s[result.job_id] = self.clock.now

    def until(self, is_so: Callable[[], bool]) -> None:
        for _ in range(100_000):
            if is_so():
                return
            self.step()
        raise AssertionError("it never came to that")

    def finish(self, *job_ids: int) -> None:
        self.until(lambda: all(job_id in self.results for job_id in job_ids))

    def run_until(self, now: float) -> None:
        while self.clock.now < now:
            self.step(now - self.clock.now)

    def written(self, slots: range) -> None:
        """Have these slots hold their keys."""
        self.submit(1000, True, slots)
        self.finish(1000)
        assert len(self.results.pop(1000).done_keys) == len(slots)
        self.disk.started.clear()

    def starts(self, is_write: bool) -> list[float]:
        return [now for now, op in self.disk.started if op.is_write == is_write]


def key_of(slot: int) -> bytes:
    return b"key%d" % slot


def data_of(slot: int) -> bytes:
    return random.Random(slot).randbytes(SLOT_BYTES)

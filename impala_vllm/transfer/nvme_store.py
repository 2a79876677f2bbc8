"""The NVMe tier's mechanism as the engine sees it: submit and poll, never wait.

Threads: the engine's calls everything here; `impala-nvme`, a daemon, runs the `Coordinator`, which owns slab and block
I/O. They share two deques and read each other's plain numbers; there is no lock.
"""

import logging
import time
from collections.abc import Callable, Sequence
from threading import Thread

from impala_vllm.transfer.block_io import BlockIo
from impala_vllm.transfer.coordinator import Coordinator
from impala_vllm.transfer.counters import Counters
from impala_vllm.transfer.jobs import Item, Job, Result
from impala_vllm.transfer.limits import Limits
from impala_vllm.transfer.messages import Forget, Message, Withdraw
from impala_vllm.transfer.slab import Slab
from impala_vllm.transfer.slab_records import MAX_KEY_BYTES

logger = logging.getLogger("vllm.impala")


def utc_day() -> int:
    """Days since 1970, UTC."""
    return int(time.time() // 86400)


class NvmeStore:
    """Keys' data in a slab's slots. The caller keeps the index of what lies where, and decides what goes.

    A job's buffers are the store's from submit until `poll` returns its result, whatever happens in between. `Slab` and
    engine are the store's from the start. Methods of one thread, but for `is_open` and the numbers.
    """

    def __init__(
        self,
        slab: Slab,
        io: BlockIo,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        today: Callable[[], int] = utc_day,
    ) -> None:
        self.limits = limits or Limits()
        self._slab, self._io, self._clock, self._today = slab, io, clock, today
        self._coordinator = Coordinator(slab, io, self.limits, clock, today)
        self._jobs: dict[int, Job] = {}
        self._reads: dict[int, Job] = {}
        self._queued_write_bytes = 0
        self._serial = 0
        self._is_stopping = False
        self._is_over = False
        """Set by the coordinator's thread when it takes no more messages."""
        self._thread = Thread(target=self._run, name="impala-nvme", daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether the breaker is open, or the thread gone: ask for nothing, and do not wait for what was asked."""
        coordinator = self._coordinator
        if self._is_over or coordinator.breaker.is_open or self._is_stalled():
            return True
        oldest_s = coordinator.oldest_read_s
        return oldest_s is not None and self._clock() - oldest_s >= self.limits.stuck_s

    @property
    def io_name(self) -> str:
        """What does the I/O, for people."""
        return self._io.name

    @property
    def counters(self) -> Counters:
        """Live totals."""
        return self._coordinator.counters

    @property
    def num_jobs(self) -> int:
        """Jobs submitted whose result was not polled yet."""
        return len(self._jobs)

    @property
    def queued_read_bytes(self) -> int:
        """Data of reads that is still to come, as far as can be told here; of withdrawn jobs, none. O(reads)."""
        return sum(job.left_bytes for job in self._reads.values() if not job.is_withdrawn)

    @property
    def queued_write_bytes(self) -> int:
        """Data of writes whose result was not polled yet."""
        return self._queued_write_bytes

    @property
    def write_bytes_today(self) -> int:
        """Bytes written to the device since midnight UTC, earlier processes included."""
        wear = self._slab.wear
        return wear.day_bytes if wear.day == self._today() else 0

    @property
    def write_bytes_ever(self) -> int:
        """Bytes written to the device over the slab's life."""
        return self._slab.wear.total_bytes

    @property
    def read_bytes_per_s(self) -> float | None:
        """What reads get from the disk while there are any, the cap included; None: not known yet."""
        return _least(self._coordinator.flights.read_meter.bytes_per_s, self.limits.read_bytes_per_s)

    @property
    def write_bytes_per_s(self) -> float | None:
        """What writes get from the disk while there are any, the cap included; None: not known yet."""
        return _least(self._coordinator.flights.write_meter.bytes_per_s, self.limits.write_bytes_per_s)

    def submit_write(self, job_id: int, items: Sequence[Item]) -> bool:
        """Write the items and record their keys; what their slots held is forgotten when they start.

        Returns False, taking nothing, where the staging budget is used up or the breaker is open. Raises ValueError on
        a job id in use and on items that do not fit the slab.
        """
        self._check(job_id, items)
        num_bytes = sum(item.buffer.nbytes for item in items)
        if self.is_open or self._queued_write_bytes + num_bytes > self.limits.max_queued_write_bytes:
            return False
        self._queued_write_bytes += num_bytes
        self._submit(Job(job_id, True, tuple(items), num_bytes))
        return True

    def submit_read(self, job_id: int, items: Sequence[Item]) -> None:
        """Read the items, before all writes; each is verified against key and checksum.

        With an open breaker it comes back untried. Raises ValueError like `submit_write`.
        """
        self._check(job_id, items)
        job = self._reads[job_id] = Job(job_id, False, tuple(items))
        self._submit(job)

    def cancel(self, job_id: int) -> bool:
        """Start nothing more of the job; its result still comes from `poll`.

        Returns whether something of it had not started yet, as far as can be told here: the result says what was done.
        """
        job = self._jobs.get(job_id)
        if job is None or not job.has_waiting:
            return False
        job.is_withdrawn = True
        self._post(Withdraw(job_id))
        return True

    def forget(self, slots: Sequence[int]) -> None:
        """What the slots hold, or get from jobs submitted before, is void; also after a restart."""
        self._serial += 1
        self._post(Forget(slots, self._serial))

    def clear(self) -> None:
        """`forget` every slot, and what was submitted before; nothing written from now on outlives this process."""
        self._serial += 1
        self._post(Forget(None, self._serial))

    def poll(self) -> list[Result]:
        """Results since the last call. With them the jobs' buffers are the caller's again."""
        results: list[Result] = []
        while self._coordinator.results:
            result = self._coordinator.results.popleft()
            job = self._jobs.pop(result.job_id)
            self._reads.pop(result.job_id, None)
            self._queued_write_bytes -= job.staged_bytes
            results.append(result)
        return results

    def close(self, timeout_s: float = 30.0) -> None:
        """Withdraw what has not started, wait for the rest, let go of the slab. Idempotent.

        Results can be polled afterwards. A disk that does not answer within `timeout_s` keeps the buffers it has, and
        the slab stays locked until it answers.
        """
        self._is_stopping = True
        self._io.wake()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("%s: the disk does not answer; closed without it", self._slab.path)

    def _check(self, job_id: int, items: Sequence[Item]) -> None:
        if job_id in self._jobs:
            raise ValueError(f"job {job_id} is under way")
        num_slots, slot_bytes = self._slab.num_slots, self._slab.slot_bytes
        for key, slot, buffer, _ in items:
            if not 0 < len(key) <= MAX_KEY_BYTES:
                raise ValueError(f"job {job_id}: a key of {len(key)} bytes, not of 1 to {MAX_KEY_BYTES}")
            if not 0 <= slot < num_slots:
                raise ValueError(f"job {job_id}: slot {slot} of {num_slots}")
            if buffer.nbytes > slot_bytes:
                raise ValueError(f"job {job_id}: {buffer.nbytes} bytes for a slot of {slot_bytes}")

    def _submit(self, job: Job) -> None:
        self._serial += 1
        job.serial = self._serial
        self._jobs[job.job_id] = job
        self._post(job)

    def _post(self, message: Message) -> None:
        self._coordinator.inbox.append(message)
        self._io.wake()
        if self._is_over:  # it may have taken its last look before the append
            self._coordinator.refuse_inbox()

    def _is_stalled(self) -> bool:
        since_s = self._coordinator.busy_since_s
        return since_s is not None and self._clock() - since_s >= self.limits.stuck_s

    def _run(self) -> None:
        coordinator = self._coordinator
        try:
            while not self._is_stopping:
                coordinator.step()
            coordinator.stop()
        except BaseException:  # a thread that only went away would leave its jobs without results
            logger.exception("%s: the NVMe tier failed and is switched off", self._slab.path)
            coordinator.die()
        finally:
            self._is_over = True
            coordinator.refuse_inbox()


def _least(measured: float | None, cap: float | None) -> float | None:
    return measured if measured is None or cap is None else min(measured, cap)

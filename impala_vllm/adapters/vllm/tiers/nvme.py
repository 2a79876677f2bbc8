"""The NVMe tier as the manager sees it: slots, whose chunks they hold, and the jobs under way to and from host.

Everything here runs on the engine loop's thread and returns at once; the store's thread moves the bytes and verifies
what it reads. Jobs hold pins on what they read and reservations on what they fill, so a slow disk costs room, never a
wrong byte. A chunk that could not be read is forgotten: a miss.
"""

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from impala_vllm.adapters.vllm.tiers.turns import Turns
from impala_vllm.core.allocator import Key, Pin, SlotPool
from impala_vllm.core.chains import Chains
from impala_vllm.core.idle import IdleKv
from impala_vllm.core.planner import Planner
from impala_vllm.core.reach import leading
from impala_vllm.core.types import TraceId
from impala_vllm.transfer.jobs import Item
from impala_vllm.transfer.nvme_store import NvmeStore

WINDOW_S = 0.5
"""Reads for waiting turns are asked for this far ahead of the disk: what is queued cannot be put in a better order."""

LATE_S, LATE_FACTOR = 1.0, 4.0
"""A read that takes so much longer than expected is not waited for: its turn computes."""

WRITE_BYTES = 64 << 20
"""Most of one write: the store takes all of it or nothing, and room is made before it is asked."""

RECALL_EVERY_S = 0.05
MAX_RECALLS = 8
"""Traces looked at in one go."""


@dataclass(slots=True)
class _Job:
    is_write: bool
    keys: Sequence[Key]
    trace_id: TraceId | None
    source: Pin
    host_slots: Sequence[int]
    nvme_slots: Sequence[int]
    late_s: float
    epoch: int
    is_recall: bool = False


class NvmeTier:
    """Owns the store. `recovered` is what its slab held at the start, `rows` gives the bytes of a host slot."""

    def __init__(
        self,
        store: NvmeStore,
        num_slots: int,
        recovered: Mapping[Key, int],
        rows: Callable[[int], memoryview],
        chunk_bytes: int,
    ) -> None:
        self.store = store
        self.pool = SlotPool(num_slots)
        self.chains = Chains(num_slots, self._worth)
        self.pool.restore(recovered)
        self.chains.add(list(recovered)[::-1])  # nobody's, oldest write first
        self.promoted: set[Key] = set()
        """In host, read from here and not used since."""
        self.num_recalled = self.num_wasted = self.num_failed = self.num_unplaced = 0
        """Chunks."""
        self._recalled: set[Key] = set()
        self._rows = rows
        self._chunk_bytes = chunk_bytes
        self._jobs: dict[int, _Job] = {}
        self._reading: dict[Key, int] = {}
        self._num_jobs = self._epoch = 0
        self._due: list[tuple[float, int, TraceId]] = []
        self._awaited: set[TraceId] = set()
        self._num_due = 0
        self._looked_s = 0.0
        self._idle: IdleKv | None = None
        self._planner: Planner | None = None

    def bind(
        self,
        host: SlotPool,
        host_chains: Chains,
        turns: Turns,
        evict_from_host: Callable[[Sequence[Key]], None],
        came_to_host: Callable[[Sequence[Key]], None],
    ) -> None:
        """The tier above, how to make room there, and who wants to know what was read into it."""
        self._host, self._host_chains, self._turns = host, host_chains, turns
        self._evict_from_host, self._came_to_host = evict_from_host, came_to_host

    def attach(self, idle: IdleKv, planner: Planner) -> None:
        self._idle, self._planner = idle, planner

    def detach(self) -> None:
        """Policy is gone, and with it the traces."""
        self._idle = self._planner = None
        self.chains.release_all()
        self._due.clear()
        self._awaited.clear()
        for job in self._jobs.values():
            job.trace_id = None

    @property
    def is_usable(self) -> bool:
        """The breaker is closed: the disk answers."""
        return not self.store.is_open

    def has(self, key: Key) -> bool:
        """Ready to be read, as far as is known."""
        return self.is_usable and self.pool.is_ready(key)

    def is_late(self, key: Key, now: float) -> bool:
        """Its read is overdue: do not wait for it."""
        job = self._jobs.get(self._reading.get(key, -1))
        return job is not None and now > job.late_s

    def is_reading(self, key: Key) -> bool:
        """The chunk is on its way into host."""
        return key in self._reading

    def is_busy(self, now: float) -> bool:
        """Some read is under way and not overdue. O(jobs)."""
        return any(not job.is_write and now <= job.late_s for job in self._jobs.values())

    def queued_s(self) -> float:
        """Seconds of reading asked for and not done."""
        return self._planner.nvme.wait_s() if self._planner is not None else 0.0

    def write(self, keys: Iterable[Key], trace_id: TraceId | None, now: float) -> None:
        """Copy host chunks that are not here yet. What is not ready, finds no room or a busy disk is not written."""
        held = self.pool.keys()
        fresh = [key for key in keys if key not in held and self._host.is_ready(key)]
        if not fresh or not self.is_usable:
            return
        step = max(1, WRITE_BYTES // self._chunk_bytes)
        for start in range(0, len(fresh), step):
            if not self._write(fresh[start : start + step], trace_id, now):
                break

    def promote(
        self,
        keys: Sequence[Key],
        trace_id: TraceId | None,
        now: float,
        stays: Callable[[Key], bool],
        spared: Collection[TraceId] | None = None,
    ) -> bool:
        """Start to read chunks that are here into host; false where nothing of them can be.

        A turn waits for them: room is made by whatever is worth least, but for the traces `spared` and what `stays`.
        None: nobody waits, and only what is worth less than the trace's own chunks has to make room.
        """
        wanted = [key for key in keys if key not in self._host and self.pool.is_ready(key)]
        if not wanted or not self.is_usable:
            return False
        lacking = len(wanted) - self._host.num_free
        if lacking > 0:
            self._evict_from_host(
                self._host_chains.victims(
                    lacking,
                    lambda k: self._host.is_evictable(k) and not stays(k),
                    (*(spared or ()), trace_id) if trace_id is not None else spared or (),
                    only_cheaper_than=trace_id if spared is None else None,
                )
            )
            wanted = wanted[: self._host.num_free]
        slots = self._host.reserve(wanted)
        if not wanted or slots is None:
            return False
        pin = self.pool.pin(wanted)
        num_bytes = len(wanted) * self._chunk_bytes
        expected_s = 0.0
        if self._planner is not None:
            self._planner.nvme.queued_bytes += num_bytes
            expected_s = self._planner.nvme.wait_s()
        late_s = now + max(LATE_S, LATE_FACTOR * expected_s)
        job = _Job(False, wanted, trace_id, pin, slots, pin.slots, late_s, self._epoch, spared is None)
        number = self._number(job)
        self._reading.update(dict.fromkeys(wanted, number))
        items = [Item(k, n, self._rows(h)) for k, n, h in zip(wanted, pin.slots, slots, strict=True)]
        self.store.submit_read(number, items)
        return True

    def poll(self, now: float) -> None:
        """Take note of what the store has done."""
        for result in self.store.poll():
            job = self._jobs.pop(result.job_id)
            job.source.release()
            if job.epoch != self._epoch:
                self._host.settle(job.host_slots)
                self.pool.settle(job.nvme_slots)
            elif job.is_write:
                self._written(job, result.done_keys)
            else:
                self._read(job, result.done_keys, result.failed_keys)
            self._turns.changed(job.trace_id)
            if self._planner is not None and not job.is_write:
                link = self._planner.nvme
                link.queued_bytes = max(0, link.queued_bytes - len(job.keys) * self._chunk_bytes)
                link.bytes_per_s = self.store.read_bytes_per_s or link.bytes_per_s

    def recall(self, now: float) -> None:
        """Start what is due to be in host before its trace is back. Looks at a few traces, a few times a second."""
        if self._planner is None or self._idle is None or now - self._looked_s < RECALL_EVERY_S:
            return
        self._looked_s = now
        for _ in range(MAX_RECALLS):
            if not self._due or self._due[0][0] > now or self.queued_s() > WINDOW_S:
                return
            trace_id = heapq.heappop(self._due)[2]
            self._awaited.discard(trace_id)
            keys = self._turns.keys_of(trace_id)
            behind = keys[leading(keys, self._host.__contains__) :]
            due_s = self._planner.recall_due_s(trace_id, len(behind) * self._chunk_bytes, now)
            if due_s is None or not behind:
                continue
            if due_s > now + RECALL_EVERY_S:
                self._wait_until(due_s, trace_id)
            else:
                self.promote(behind[: leading(behind, self.has)], trace_id, now, set(keys).__contains__)

    def expect(self, trace_id: TraceId, now: float) -> None:
        """The trace is silent and not all of it is in host: look at it again when a recall may be due."""
        if self._planner is not None and trace_id not in self._awaited:
            due_s = self._planner.recall_due_s(trace_id, 0, now)
            if due_s is not None:
                self._wait_until(due_s, trace_id)

    def used(self, keys: Iterable[Key]) -> None:
        """Chunks in host were loaded into HBM."""
        if self.promoted:
            keys = set(keys)
            self.promoted -= keys
            self._recalled -= keys

    def left_host(self, keys: Iterable[Key]) -> None:
        """Chunks were evicted from host."""
        keys = list(keys)
        self.promoted.difference_update(keys)
        wasted = self._recalled.intersection(keys)
        self.num_wasted += len(wasted)
        self._recalled -= wasted

    def reset(self) -> set[Key]:
        """Forget everything. Returns the chunks whose host slots the store still reads or writes."""
        moving = {key for job in self._jobs.values() if job.epoch == self._epoch for key in job.keys}
        self._epoch += 1
        self.pool.clear(moving)
        self.chains.clear()
        self.store.clear()
        self._reading.clear()
        self.promoted.clear()
        self._recalled.clear()
        self._due.clear()
        self._awaited.clear()
        return moving

    def close(self) -> None:
        """End the store and let go of host memory, but for what a disk that hangs still has."""
        self.store.close()
        for result in self.store.poll():
            del self._jobs[result.job_id]
        self._rows = _no_rows

    def stats(self) -> dict[str, float]:
        """Counters and gauges, for the snapshot."""
        counted, size = self.store.counters, self._chunk_bytes
        return {
            "nvme_usable": float(self.is_usable),
            "nvme_size_bytes": float(self.pool.num_slots * size),
            "nvme_used_bytes": float(len(self.pool) * size),
            "nvme_read_bytes": float(counted.read_bytes),
            "nvme_write_bytes": float(counted.write_bytes),
            "nvme_unplaced_bytes": float(self.num_unplaced * size),
            "nvme_failed_bytes": float(self.num_failed * size),
            "nvme_errors": float(counted.num_read_errors + counted.num_write_errors),
            "nvme_checksum_failures": float(counted.num_checksum_failures),
            "recall_bytes": float(self.num_recalled * size),
            "recall_wasted_bytes": float(self.num_wasted * size),
        }

    def _write(self, fresh: Sequence[Key], trace_id: TraceId | None, now: float) -> bool:
        """False: no use to go on."""
        lacking = len(fresh) - self.pool.num_free
        if lacking > 0:
            wanted = set(fresh)
            self._evict(
                self.chains.victims(
                    lacking, lambda k: k not in wanted and self.pool.is_evictable(k), only_cheaper_than=trace_id
                )
            )
        num_wanted, fresh = len(fresh), fresh[: self.pool.num_free]
        self.num_unplaced += num_wanted - len(fresh)
        slots = self.pool.reserve(fresh)
        if not fresh or slots is None:
            return False
        pin = self._host.pin(fresh)
        items = [Item(k, n, self._rows(h)) for k, n, h in zip(fresh, slots, pin.slots, strict=True)]
        number = self._number(_Job(True, fresh, trace_id, pin, pin.slots, slots, now, self._epoch))
        if self.store.submit_write(number, items):
            return True
        del self._jobs[number]
        pin.release()
        self.pool.abort(fresh)  # the room stays free for the next one
        return False

    def _written(self, job: _Job, done: Iterable[Key]) -> None:
        done = set(done)
        kept = [key for key in job.keys if key in done]
        self.pool.commit(kept)
        self.pool.abort([key for key in job.keys if key not in done])
        self.chains.add(kept, job.trace_id)

    def _read(self, job: _Job, done: Iterable[Key], failed: Sequence[Key]) -> None:
        done = set(done)
        kept = [key for key in job.keys if key in done]
        self._host.commit(kept)
        self._host.abort([key for key in job.keys if key not in done])
        self._host_chains.add(kept, job.trace_id)
        self.promoted.update(kept)
        self._came_to_host(kept)
        if job.is_recall:
            self.num_recalled += len(kept)
            self._recalled.update(kept)
        for key in job.keys:
            self._reading.pop(key, None)
        self.num_failed += len(failed)
        self._evict([key for key in failed if self.pool.is_evictable(key)])

    def _evict(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._turns.changed(self.chains.trace_of(key))
            slot = self.pool.slot(key)
            if slot is not None:
                self.store.forget(slot)
        self.pool.evict(keys)
        self.chains.drop(keys)

    def _number(self, job: _Job) -> int:
        self._num_jobs += 1
        self._jobs[self._num_jobs] = job
        return self._num_jobs

    def _wait_until(self, due_s: float, trace_id: TraceId) -> None:
        self._num_due += 1
        self._awaited.add(trace_id)
        heapq.heappush(self._due, (due_s, self._num_due, trace_id))

    def _worth(self, trace_id: TraceId) -> float:
        return self._idle.worth_in_nvme(trace_id) if self._idle is not None else 0.0


def _no_rows(slot: int) -> memoryview:
    raise AssertionError("the tier is closed")

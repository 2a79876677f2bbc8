"""The NVMe tier as the manager sees it: slots, whose chunks they hold, and the jobs under way to and from host.

Everything here runs on the engine loop's thread and returns at once; the store's thread moves the bytes and verifies
what it reads. Jobs hold pins on what they read and reservations on what they fill, so a slow disk costs room, never a
wrong byte. A chunk that could not be read is forgotten: a miss.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from impala_vllm.adapters.vllm.tiers.demotions import Demotion, Demotions
from impala_vllm.adapters.vllm.tiers.host import HostTier
from impala_vllm.adapters.vllm.tiers.moves import Move, Moves
from impala_vllm.adapters.vllm.tiers.one_shots import OneShots
from impala_vllm.adapters.vllm.tiers.turns import Turn, Turns
from impala_vllm.core.allocator import Key, SlotPool
from impala_vllm.core.chains import Chains
from impala_vllm.core.idle import IdleKv
from impala_vllm.core.planner import Planner
from impala_vllm.core.types import TraceId
from impala_vllm.transfer.jobs import Item
from impala_vllm.transfer.nvme_store import NvmeStore

WINDOW_S = 0.5
"""Reads for waiting turns are asked for this far ahead of the disk: what is queued cannot be put in a better order."""

LATE_S, LATE_FACTOR, LATEST_S = 1.0, 4.0, 300.0
"""A read that takes a second and so many times as long as expected, or the last of these, is not waited for."""


class NvmeTier:
    """Owns the store. `recovered` is what its slab held at the start, what can be spared first.

    `rows` gives the bytes of a host slot.
    """

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
        self.chains.add(list(recovered)[::-1])  # nobody's, and they go in their order
        self.promoted: set[Key] = set()
        """In host, read from here and not used since."""
        self.num_failed = 0
        """Chunks."""
        self._rows = rows
        self._chunk_bytes = chunk_bytes
        self._moves = Moves()
        self._idle: IdleKv | None = None
        self._planner: Planner | None = None

    def bind(self, host: HostTier, turns: Turns, one_shots: OneShots) -> None:
        """The tier above, and what is known of turns and traces."""
        self._host, self._turns, self._one_shots = host, turns, one_shots
        self.demotions = Demotions(self.store, self._moves, host.pool, self.pool, self._make_room, self._chunk_bytes)

    def attach(self, idle: IdleKv, planner: Planner) -> None:
        self._idle, self._planner = idle, planner
        cap = self.store.limits.read_bytes_per_s
        if cap:
            planner.nvme.bytes_per_s = min(planner.nvme.bytes_per_s, cap)

    def detach(self) -> None:
        """Policy is gone."""
        self._idle = self._planner = None

    def forget_all(self) -> None:
        """There are no traces any more."""
        self.chains.release_all()
        self._moves.forget_traces()
        self.demotions.forget()

    @property
    def is_usable(self) -> bool:
        """The breaker is closed: the disk answers."""
        return not self.store.is_open

    @property
    def here(self) -> Collection[Key]:
        """Chunks ready to be read, as far as is known. To look at now, not to keep."""
        return self.pool.ready if self.is_usable else ()

    def is_late(self, key: Key, now: float) -> bool:
        """Its read is overdue, or the disk does not answer: do not wait for it."""
        return not self.is_usable or self._moves.is_late(key, now)

    def is_reading(self, key: Key) -> bool:
        """The chunk is on its way into host."""
        return self._moves.is_reading(key)

    def is_busy(self, now: float) -> bool:
        """Some read is under way and not overdue. O(jobs)."""
        return self.is_usable and self._moves.is_busy(now)

    def queued_s(self) -> float:
        """Seconds of reading asked for and not done."""
        return self._planner.nvme.wait_s() if self._planner is not None else 0.0

    def write(
        self, keys: Iterable[Key], trace_id: TraceId | None, now: float, parent: Callable[[Key], Key | None]
    ) -> None:
        """Copy host chunks that are not here yet, see `Demotions.start`. `parent`: what lies before one."""
        self.demotions.start(Demotion(list(keys), trace_id, parent), self._rows, now)

    def promote(
        self,
        keys: Sequence[Key],
        trace_id: TraceId | None,
        now: float,
        place: Callable[[Key], int | None],
        spared: Collection[TraceId],
    ) -> bool:
        """Start to read chunks that are here into host; false where nothing of them can be.

        A turn waits for them: room is made as by `HostTier.make_room`, to which `place` and `spared` go.
        """
        host = self._host.pool
        wanted = host.missing(filter(self.pool.ready.__contains__, keys))
        if not wanted or not self.is_usable:
            return False
        self._host.make_room(len(wanted), place, {*spared, trace_id} if trace_id is not None else spared)
        wanted = wanted[: host.num_free]
        slots = host.reserve(wanted)
        if not wanted or slots is None:
            return False
        pin = self.pool.pin(wanted)
        num_bytes = len(wanted) * self._chunk_bytes
        expected_s = 0.0
        if self._planner is not None:
            self._planner.nvme.queued_bytes += num_bytes
            expected_s = self._planner.nvme.wait_s()
        late_s = now + min(max(LATE_S, LATE_FACTOR * expected_s), LATEST_S)
        number = self._moves.start(Move(False, wanted, trace_id, pin, slots, pin.slots, late_s))
        items = [Item(k, n, self._rows(h)) for k, n, h in zip(wanted, pin.slots, slots, strict=True)]
        self.store.submit_read(number, items)
        return True

    def poll(self, now: float) -> None:
        """Take note of what the store has done and how fast, and call back what is overdue."""
        results = self.store.poll()
        for result in results:
            move = self._moves.end(result.job_id)
            move.source.release()
            if move.is_void:
                self._host.pool.settle(move.host_slots)
                self.pool.settle(move.nvme_slots)
            elif move.is_write:
                self._written(move, result.done_keys)
            else:
                self._read(move, result.done_keys, result.failed_keys)
            self._turns.changed(move.trace_id)
        if any(result.is_write for result in results):
            self.demotions.go_on(self._rows, now)
        for job_id, key in self._moves.overdue(now):
            self._turns.give_up(key)
            self._call_back(job_id)
        if self._planner is not None:
            link = self._planner.nvme
            link.queued_bytes = self.store.queued_read_bytes
            link.bytes_per_s = self.store.read_bytes_per_s or link.bytes_per_s

    def leave(self, turn: Turn) -> None:
        """The turn has ended: what is read for it alone is called back. O(reads; for each of its own, open turns)."""
        if not self._moves.num_reads:
            return
        for job_id, key in self._moves.reads_for(turn.own_keys()):
            if not self._turns.is_wanted(key):
                self._call_back(job_id)

    def used(self, keys: Iterable[Key]) -> None:
        """Chunks in host were loaded into HBM."""
        if self.promoted:
            self.promoted.difference_update(keys)

    def left_host(self, keys: Sequence[Key]) -> None:
        """Chunks were evicted from host."""
        self.promoted.difference_update(keys)

    def reset(self) -> set[Key]:
        """Forget everything. Returns the chunks whose host slots the store still reads or writes."""
        moving = self._moves.void()
        self.pool.clear(moving)
        self.chains.clear()
        self.store.clear()
        self.promoted.clear()
        self.demotions.forget()
        return moving

    def close(self) -> None:
        """End the store and let go of host memory, but for what a disk that hangs still has."""
        self.store.close()
        for result in self.store.poll():
            self._moves.end(result.job_id)
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
            "nvme_write_today_bytes": float(self.store.write_bytes_today),
            "nvme_write_ever_bytes": float(self.store.write_bytes_ever),
            "nvme_unplaced_bytes": float(self.demotions.num_unplaced * size),
            "nvme_failed_bytes": float(self.num_failed * size),
            "nvme_errors": float(counted.num_read_errors + counted.num_write_errors),
            "nvme_checksum_failures": float(counted.num_checksum_failures),
            "one_shot_bytes": float(self._one_shots.num_stored * size),
            "one_shot_nvme_bytes": float(self._one_shots.num_written * size),
        }

    def _call_back(self, job_id: int) -> None:
        self._moves.withdraw(job_id)
        self.store.cancel(job_id)

    def _written(self, move: Move, done: Sequence[Key]) -> None:
        kept, lost = _parted(move.keys, done)
        self.pool.commit(kept)
        self.pool.abort(lost)
        self.chains.add(kept, move.trace_id)
        self._one_shots.written(move.trace_id, len(kept))

    def _read(self, move: Move, done: Sequence[Key], failed: Sequence[Key]) -> None:
        kept, lost = _parted(move.keys, done)
        self._host.fill(kept, move.trace_id)
        self._host.pool.abort(lost)
        self.promoted.update(kept)
        self.num_failed += len(failed)
        self._evict(self.pool.evictable(failed))

    def _make_room(self, num_chunks: int, trace_id: TraceId | None) -> None:
        self._evict(self.chains.victims(num_chunks, self.pool.evictable, only_cheaper_than=trace_id))

    def _evict(self, keys: Sequence[Key]) -> None:
        slots = self.pool.evict(keys)
        if slots:
            self.store.forget(slots)
        if keys:
            self._turns.went(self.chains.drop(keys))

    def _worth(self, trace_id: TraceId) -> float:
        return self._idle.worth_in_nvme(trace_id) if self._idle is not None else 0.0


def _parted(keys: Sequence[Key], done: Sequence[Key]) -> tuple[Sequence[Key], Sequence[Key]]:
    """Those of `keys` that are done, and the others, in their order."""
    if len(done) == len(keys):
        return keys, ()
    there = set(done)
    return [key for key in keys if key in there], [key for key in keys if key not in there]


def _no_rows(slot: int) -> memoryview:
    raise AssertionError("the tier is closed")

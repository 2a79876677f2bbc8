"""The store with its real threads and files: what the engine's thread sees, also when the disk fails."""

import os
import random
import resource
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from impala_vllm.transfer.alignment import aligned_buffer
from impala_vllm.transfer.block_io import BlockIo, Completion, Op, open_block_io
from impala_vllm.transfer.jobs import Item, Result
from impala_vllm.transfer.limits import Limits
from impala_vllm.transfer.nvme_store import NvmeStore
from impala_vllm.transfer.slab import Slab, SlabError
from tests.transfer.finishing import LONG_S, finish
from tests.transfer.virtual import ManualClock

SLOT_BYTES = 64 << 10
BUDGET_BYTES = 16 << 20
PATIENT = Limits(stuck_s=3600.0)
"""For tests in which a slow machine must not look like a stuck disk."""


def key_of(slot: int) -> bytes:
    return b"key%d" % slot


def data_of(slot: int) -> bytes:
    return random.Random(slot).randbytes(SLOT_BYTES)


def to_write(slots: Sequence[int]) -> list[Item]:
    items = to_read(slots)
    for item in items:
        item.buffer[:] = data_of(item.slot)
    return items


def to_read(slots: Sequence[int]) -> list[Item]:
    return [Item(key_of(slot), slot, aligned_buffer(SLOT_BYTES)) for slot in slots]


class GatedIo:
    """An engine whose ops reach the real one when `open_gate` was called; says when it is polled with ops held."""

    def __init__(self, inner: BlockIo) -> None:
        self.alignment_bytes = inner.alignment_bytes
        self.name = inner.name
        self.is_waiting = threading.Event()
        """Set once the coordinator waits for ops that are held."""
        self.fails_with: type[BaseException] | None = None
        self._inner = inner
        self._held: list[Op] = []
        self._is_open = False

    @property
    def num_in_flight(self) -> int:
        return len(self._held) + self._inner.num_in_flight

    def submit(self, ops: Sequence[Op]) -> None:
        self._held += ops

    def poll(self, timeout_s: float = 0.0) -> list[Completion]:
        if self.fails_with is not None:
            raise self.fails_with("the engine is broken")
        if self._is_open:
            held, self._held = self._held, []
            self._inner.submit(held)
        if self._held:
            self.is_waiting.set()
        return self._inner.poll(timeout_s)

    def open_gate(self) -> None:
        self._is_open = True
        self.wake()

    def wake(self) -> None:
        self._inner.wake()

    def close(self) -> None:
        self._inner.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., NvmeStore]]:
    stores: list[NvmeStore] = []

    def make(limits: Limits = PATIENT, wrap: Callable[[BlockIo], BlockIo] = lambda io: io, **more) -> NvmeStore:
        slab = Slab.open(tmp_path / "tier", BUDGET_BYTES, SLOT_BYTES, "a")
        stores.append(NvmeStore(slab, wrap(open_block_io(slab.fd)), limits, **more))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def gated(make) -> tuple[NvmeStore, GatedIo, ManualClock]:
    """A store on a disk that waits for the test, with a clock that does as well."""
    gates: list[GatedIo] = []
    clock = ManualClock()

    def wrap(io: BlockIo) -> GatedIo:
        gates.append(GatedIo(io))
        return gates[0]

    store = make(Limits(stuck_s=5.0), wrap, clock=clock)
    return store, gates[0], clock


def test_data_survives_the_way_to_disk_and_back_and_a_restart(make):
    store = make()
    assert store.submit_write(1, to_write(range(63)))
    assert set(finish(store)[1].done_keys) == {key_of(slot) for slot in range(63)}
    store.close()
    store = make()
    assert store._slab.recovered == {key_of(slot): slot for slot in range(63)}
    items = to_read(range(63))
    store.submit_read(2, items)
    result = finish(store)[2]
    assert len(result.done_keys) == 63
    assert result.num_bytes == 63 * SLOT_BYTES
    assert all(item.buffer == data_of(item.slot) for item in items)


def test_poll_returns_each_result_once_and_numbers_add_up(make):
    store = make()
    for job_id in range(20):
        assert store.submit_write(job_id, to_write(range(job_id * 5, job_id * 5 + 5)))
    assert store.num_jobs == 20
    assert set(finish(store)) == set(range(20))
    assert store.poll() == []
    assert (store.num_jobs, store.queued_write_bytes) == (0, 0)
    assert store.counters.num_writes == 100
    assert store.write_bytes_today == store.write_bytes_ever == 100 * SLOT_BYTES
    assert store.write_bytes_per_s is not None
    assert store.write_bytes_per_s > 0
    assert store.read_bytes_per_s is None


def test_the_bandwidth_told_is_at_most_the_cap(make):
    store = make(Limits(stuck_s=3600.0, write_bytes_per_s=1000.0))
    store.submit_write(1, to_write([1]))
    finish(store)
    assert store.write_bytes_per_s == 1000.0


def test_the_day_starts_at_nothing_and_earlier_processes_count(make):
    day = 20_000
    store = make(today=lambda: day)
    store.submit_write(1, to_write(range(3)))
    finish(store)
    store.close()
    store = make(today=lambda: day)
    assert store.write_bytes_today == 3 * SLOT_BYTES
    day += 1
    assert store.write_bytes_today == 0
    assert store.write_bytes_ever == 3 * SLOT_BYTES


def test_writes_over_the_staging_budget_are_not_taken(gated):
    store, gate, _ = gated
    store.limits = Limits(max_queued_write_bytes=4 * SLOT_BYTES)
    assert store.submit_write(1, to_write(range(3)))
    assert not store.submit_write(2, to_write(range(3, 5)))
    assert store.submit_write(2, to_write([3]))
    assert not store.submit_write(3, to_write([4]))
    assert store.num_jobs == 2
    gate.open_gate()
    finish(store)
    assert store.submit_write(3, to_write([4]))


def test_a_read_of_a_slow_disk_delays_nobody_and_can_be_given_up(gated):
    store, gate, clock = gated
    store.submit_read(1, to_read([0]))  # nothing there: failed without the disk
    assert finish(store)[1].failed_keys == (key_of(0),)
    gate.open_gate()
    store.submit_write(2, to_write(range(3)))
    finish(store)
    gate._is_open = False
    items = to_read(range(3))
    store.submit_read(3, items)
    assert gate.is_waiting.wait(LONG_S)
    assert not store.is_open
    clock.advance(5.0)
    assert store.is_open, "seen without the coordinator"
    assert not store.submit_write(4, to_write([5]))
    assert store.poll() == []
    gate.open_gate()
    assert len(finish(store)[3].done_keys) == 3
    assert all(item.buffer == data_of(item.slot) for item in items)


def test_reads_asked_of_an_open_breaker_come_back_untried(gated):
    store, gate, clock = gated
    gate.open_gate()
    store.submit_write(1, to_write(range(3)))
    finish(store)
    gate._is_open = False
    store.submit_read(2, to_read([0]))
    assert gate.is_waiting.wait(LONG_S)
    clock.advance(5.0)
    gate.wake()
    store.submit_read(3, to_read([1]))
    results: list[Result] = []
    while not results:
        results = store.poll()
    assert [(result.job_id, result.untried_keys) for result in results] == [(3, (key_of(1),))]
    gate.open_gate()


@pytest.mark.parametrize("error", [RuntimeError, SystemExit], ids=["it fails", "it only ends"])
def test_a_dead_coordinator_gives_everything_back_and_takes_nothing_more(
    gated, caplog: pytest.LogCaptureFixture, error: type[BaseException]
):
    store, gate, _ = gated
    most = store.limits.max_in_flight
    gate.open_gate()
    store.submit_write(1, to_write(range(most + 1)))
    finish(store)
    gate._is_open = False
    store.submit_read(2, to_read(range(most)))  # as many as may be under way
    store.submit_read(3, to_read([most]))
    store.submit_write(4, to_write(range(30, 35)))
    assert gate.is_waiting.wait(LONG_S)
    gate.fails_with = error
    gate.wake()
    store._thread.join(LONG_S)
    results = {result.job_id: result for result in store.poll()}
    assert set(results) == {2, 3, 4}
    assert all(result.done_keys == () for result in results.values())
    assert len(results[2].failed_keys) == most
    assert len(results[3].untried_keys) == 1
    assert store.is_open
    assert "switched off" in caplog.text
    assert not store.submit_write(5, to_write([1]))
    store.submit_read(6, to_read([1]))
    assert [result.untried_keys for result in store.poll()] == [(key_of(1),)]
    assert not store.cancel(6)
    store.forget([1])
    store.clear()
    store.close()


def test_what_the_disk_may_still_write_into_is_not_given_back_when_the_engine_cannot_be_closed(
    gated, monkeypatch: pytest.MonkeyPatch
):
    store, gate, clock = gated
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    store.submit_write(1, to_write(range(4)))  # as many as may be at the disk
    store.submit_write(2, to_write([5]))
    assert gate.is_waiting.wait(LONG_S)
    close = gate.close

    def fail_to_close() -> None:
        raise RuntimeError("cannot close")

    gate.close = fail_to_close
    gate.fails_with = RuntimeError
    gate.wake()
    store._thread.join(LONG_S)
    assert [result.job_id for result in store.poll()] == [2]
    clock.advance(5.0)
    assert store.is_open
    close()


def test_cancel_says_whether_it_came_in_time(gated):
    store, gate, _ = gated
    store.submit_write(1, to_write(range(4)))  # as many as may be at the disk
    assert gate.is_waiting.wait(LONG_S)
    assert not store.cancel(1), "it is at the disk"
    store.submit_write(2, to_write([5]))
    assert store.cancel(2)
    assert not store.cancel(2)
    gate.open_gate()
    results = finish(store)
    assert set(results[1].done_keys) == {key_of(slot) for slot in range(4)}
    assert results[2].cancelled
    assert not store.cancel(2)
    assert not store.cancel(99)


def test_what_reads_still_bring_is_told_and_withdrawn_ones_bring_nothing(gated):
    store, gate, _ = gated
    gate.open_gate()
    store.submit_write(1, to_write(range(17)))
    finish(store)
    gate._is_open = False
    store.submit_read(2, to_read(range(16)))
    store.submit_read(3, to_read([16]))
    store.submit_write(4, to_write([20]))
    assert store.queued_read_bytes == 17 * SLOT_BYTES
    store.cancel(3)
    assert store.queued_read_bytes == 16 * SLOT_BYTES
    gate.open_gate()
    finish(store)
    assert store.queued_read_bytes == 0


def test_a_forgotten_slot_and_a_cleared_slab_stay_so_after_a_restart(make):
    store = make()
    store.submit_write(1, to_write(range(5)))
    finish(store)
    store.forget([2])
    store.close()
    store = make()
    assert set(store._slab.recovered.values()) == {0, 1, 3, 4}
    store.clear()
    store.submit_read(2, to_read([0]))
    assert finish(store)[2].failed_keys == (key_of(0),)
    store.close()
    store = make()
    assert store._slab.recovered == {}


def test_jobs_that_cannot_be_are_refused_at_once(make):
    store = make()
    store.submit_read(1, [])
    with pytest.raises(ValueError, match="under way"):
        store.submit_read(1, [])
    good = to_read([0])[0]
    for wrong in (
        good._replace(key=b""),
        good._replace(key=b"k" * 65),
        good._replace(slot=store._slab.num_slots),
        good._replace(slot=-1),
        good._replace(buffer=aligned_buffer(SLOT_BYTES + 4096)),
    ):
        with pytest.raises(ValueError, match="job 2"):
            store.submit_read(2, [good, wrong])
        with pytest.raises(ValueError, match="job 2"):
            store.submit_write(2, [good, wrong])
    assert store.num_jobs == 1


def test_a_misaligned_buffer_fails_alone(make):
    store = make()
    if not store._slab.is_direct:
        pytest.skip("this file system takes any alignment")
    items = to_write(range(3))
    crooked = aligned_buffer(SLOT_BYTES + 4096)[1 : SLOT_BYTES + 1]
    items[1] = items[1]._replace(buffer=crooked)
    store.submit_write(1, items)
    result = finish(store)[1]
    assert set(result.done_keys) == {key_of(0), key_of(2)}
    assert result.failed_keys == (key_of(1),)


def test_shorter_data_than_a_slot_is_read_at_its_length_only(make):
    store = make()
    item = Item(b"short", 3, aligned_buffer(4096))
    item.buffer[:] = os.urandom(4096)
    store.submit_write(1, [item])
    finish(store)
    received = Item(b"short", 3, aligned_buffer(4096))
    store.submit_read(2, [received])
    store.submit_read(3, [Item(b"short", 3, aligned_buffer(SLOT_BYTES))])
    results = finish(store)
    assert results[2].done_keys == (b"short",)
    assert received.buffer == item.buffer
    assert results[3].failed_keys == (b"short",)


def test_a_data_file_truncated_under_it_is_errors_and_then_an_open_breaker(make):
    store = make(Limits(stuck_s=3600.0, max_consecutive_errors=8))
    store.submit_write(1, to_write(range(40)))
    finish(store)
    os.truncate(store._slab.path, 10 * SLOT_BYTES)
    store.submit_read(2, to_read(range(40)))
    result = finish(store)[2]
    assert set(result.done_keys) <= {key_of(slot) for slot in range(10)}
    assert store.counters.num_read_errors >= 8
    assert store.is_open


def test_an_index_file_truncated_under_it_costs_a_restart_its_contents_only(make):
    store = make()
    store.submit_write(1, to_write(range(10)))
    finish(store)
    os.truncate(store._slab.path.with_suffix(".index"), 100)
    items = to_read(range(10))
    store.submit_read(2, items)
    store.submit_write(3, to_write(range(10, 20)))
    results = finish(store)
    assert len(results[2].done_keys) == len(results[3].done_keys) == 10
    assert all(item.buffer == data_of(item.slot) for item in items)
    store.close()
    store = make()
    assert store._slab.recovered == {}


def test_a_directory_removed_under_it_changes_nothing_until_the_restart(make, tmp_path: Path):
    store = make()
    store.submit_write(1, to_write(range(10)))
    finish(store)
    shutil.rmtree(tmp_path / "tier")
    store.submit_read(2, to_read(range(10)))
    store.submit_write(3, to_write(range(10, 20)))
    results = finish(store)
    assert len(results[2].done_keys) == len(results[3].done_keys) == 10
    store.close()
    store = make()
    assert store._slab.recovered == {}


def test_a_disk_that_takes_no_more_is_failed_writes_and_an_open_breaker(make):
    store = make(Limits(stuck_s=3600.0, max_consecutive_errors=4, max_in_flight=1))
    store.submit_write(1, to_write(range(4)))
    finish(store)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * SLOT_BYTES, before[1]))
    try:
        store.submit_write(2, to_write(range(5, 20)))
        result = finish(store)[2]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.done_keys == tuple(key_of(slot) for slot in range(5, 10))
    assert len(result.failed_keys) == 4
    assert len(result.untried_keys) == 6
    assert store.is_open
    store.close()
    store = make()
    assert set(store._slab.recovered.values()) == {0, 1, 2, 3, 5, 6, 7, 8, 9}


def test_close_is_idempotent_gives_results_and_lets_the_next_one_in(make, tmp_path: Path):
    store = make()
    store.submit_write(1, to_write(range(10)))
    store.submit_read(2, to_read([0]))
    with pytest.raises(SlabError):
        Slab.open(tmp_path / "tier", BUDGET_BYTES, SLOT_BYTES, "a", wait_s=0.0)
    store.close()
    store.close()
    results = {result.job_id: result for result in store.poll()}
    assert results.keys() == {1, 2}
    num_done = len(results[1].done_keys)
    assert not store.submit_write(3, to_write([1]))
    store.submit_read(4, to_read([1]))
    assert [result.job_id for result in store.poll()] == [4]
    store = make()
    assert len(store._slab.recovered) == num_done


def test_closing_does_not_wait_for_ever_for_a_disk_that_hangs(gated, caplog: pytest.LogCaptureFixture):
    store, gate, _ = gated
    store.submit_write(1, to_write([1]))
    assert gate.is_waiting.wait(LONG_S)
    store.close(timeout_s=0.05)
    assert "does not answer" in caplog.text
    assert store.poll() == []
    gate.open_gate()
    store.close()
    assert [result.job_id for result in store.poll()] == [1]


def test_its_thread_is_a_named_daemon_and_gone_after_close(make):
    store = make()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "impala-nvme"]
    assert thread.daemon
    store.close()
    assert not thread.is_alive()


def test_many_threads_worth_of_traffic_keeps_every_promise(make):
    """The engine's side and the coordinator's race for real: nothing is lost, nothing comes twice, no byte is wrong."""
    store, draw = make(), random.Random(5)
    under_way: dict[int, list[Item]] = {}
    seen: dict[int, Result] = {}
    busy: set[int] = set()
    for job_id in range(300):
        slots = [slot for slot in draw.sample(range(200), 4) if slot not in busy]
        if draw.random() < 0.5 and store.submit_write(job_id, items := to_write(slots)):
            under_way[job_id] = items
        else:
            under_way[job_id] = items = to_read(slots)
            store.submit_read(job_id, items)
        busy.update(slots)
        if draw.random() < 0.2:
            store.cancel(draw.randrange(job_id + 1))
        for result in store.poll():
            assert result.job_id not in seen
            seen[result.job_id] = result
            busy.difference_update(item.slot for item in under_way[result.job_id])
    seen |= finish(store)
    assert seen.keys() == under_way.keys()
    for job_id, result in seen.items():
        keys = [*result.done_keys, *result.failed_keys, *result.untried_keys]
        assert sorted(keys) == sorted(item.key for item in under_way[job_id])
        for item in under_way[job_id]:
            assert item.key not in result.done_keys or item.buffer == data_of(item.slot)
    assert store.counters.num_checksum_failures == 0
    assert not store.is_open

"""What starts when, under which bounds, and what trouble does: in virtual time, on a real slab."""

import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from impala_vllm.transfer.coordinator import Coordinator
from impala_vllm.transfer.jobs import Item, Job, Result
from impala_vllm.transfer.limits import Limits
from impala_vllm.transfer.messages import Forget, Message, Withdraw
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


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(**limits) -> Rig:
        rigs.append(Rig(tmp_path, Limits(**limits)))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.disk.close()
        rig.slab.close()


def test_data_comes_back_as_it_was_written(make):
    rig = make()
    rig.written(range(50))
    job = rig.submit(1, False, range(50))
    buffers = [item.buffer for item in job.items]
    rig.finish(1)
    assert rig.results[1].done_keys == tuple(key_of(slot) for slot in range(50))
    assert [bytes(buffer) for buffer in buffers] == [data_of(slot) for slot in range(50)]
    assert rig.coordinator.counters.read_bytes == rig.coordinator.counters.write_bytes == 50 * SLOT_BYTES


def test_a_read_goes_before_all_writes_that_have_not_started(make):
    rig = make(max_in_flight=2, max_writes_in_flight=1)
    rig.written(range(5))
    rig.submit(1, True, range(10, 30))
    rig.step(0.0)
    rig.submit(2, False, range(5))
    rig.finish(1, 2)
    assert rig.finished_s[2] < rig.finished_s[1]
    kinds = [op.is_write for _, op in rig.disk.started]
    assert kinds.index(False) == 1
    last_read = max(i for i, is_write in enumerate(kinds) if not is_write)
    assert sum(kinds[:last_read]) <= 6, "one write at a time beside the reads"


def test_bounds_on_what_is_at_the_disk_hold(make):
    rig = make(max_in_flight=5, max_writes_in_flight=2)
    rig.written(range(100))
    rig.submit(1, True, range(100, 200))
    rig.submit(2, False, range(100))
    rig.submit(3, False, range(100))
    rig.finish(1, 2, 3)
    assert rig.disk.most_in_flight == 5
    assert rig.disk.most_writes_in_flight == 2


def test_a_job_cancelled_before_its_turn_never_touches_the_disk(make):
    rig = make(max_in_flight=1)
    rig.written(range(3))
    rig.submit(2, False, [0])
    job = rig.submit(1, False, range(3))
    rig.step(0.0)
    job.is_withdrawn = True
    rig.tell(Withdraw(1))
    rig.tell(Withdraw(99))
    rig.finish(1, 2)
    assert len(rig.disk.started) == 1
    assert rig.results[1].untried_keys == tuple(key_of(slot) for slot in range(3))
    assert rig.results[1].failed_keys == ()


def test_a_job_cancelled_half_way_keeps_what_it_has(make):
    rig = make(max_in_flight=2)
    rig.written(range(10))
    job = rig.submit(1, False, range(10))
    rig.until(lambda: len(job.done_keys) == 4)
    job.is_withdrawn = True
    rig.tell(Withdraw(1))
    rig.finish(1)
    result = rig.results[1]
    assert len(result.done_keys) + len(result.untried_keys) == 10
    assert len(result.untried_keys) >= 4
    assert len(rig.disk.started) == len(result.done_keys)
    assert rig.slab.record(9) is not None


@pytest.mark.parametrize("is_write", [True, False])
def test_a_cap_holds_over_time(make, is_write: bool):
    cap = {"write_bytes_per_s" if is_write else "read_bytes_per_s": 50_000.0}
    rig = make(**cap)
    rig.written(range(100))
    rig.clock.advance(100.0)
    before = rig.clock.now
    rig.submit(1, is_write, range(100))
    rig.finish(1)
    # 100 ops of 10,000 bytes at 50,000 a second, of which a tenth of a second and the last op come for free.
    assert 19.5 <= rig.clock.now - before <= 20.1


def test_reads_that_wait_for_their_cap_do_not_hold_up_writes(make):
    rig = make(read_bytes_per_s=10_000.0)
    rig.written(range(20))
    rig.submit(1, False, range(20))
    rig.submit(2, True, range(50, 80))
    before = rig.clock.now
    rig.finish(2)
    assert rig.clock.now - before < 0.1
    assert 1 not in rig.results


def test_a_slot_that_holds_another_key_is_a_failed_read_and_stays(make):
    rig = make()
    rig.written(range(3))
    rig.slab.invalidate(1)
    rig.slab.commit(1, b"other", SLOT_BYTES, 1)
    rig.submit(1, False, range(4))
    rig.finish(1)
    assert rig.results[1].failed_keys == (key_of(1), key_of(3))
    assert rig.results[1].done_keys == (key_of(0), key_of(2))
    assert rig.coordinator.counters.num_key_mismatches == 2
    assert rig.coordinator.counters.num_checksum_failures == 0
    assert rig.slab.record(1) is not None


def test_a_flipped_bit_on_disk_is_found_counted_and_the_record_dropped(make):
    rig = make()
    rig.written(range(3))
    byte = os.pread(rig.slab.fd, 1, SLOT_BYTES + 77)[0]
    os.pwrite(rig.slab.fd, bytes([byte ^ 16]), SLOT_BYTES + 77)
    rig.submit(1, False, range(3))
    rig.finish(1)
    assert rig.results[1].failed_keys == (key_of(1),)
    assert rig.coordinator.counters.num_checksum_failures == 1
    assert rig.slab.record(1) is None
    rig.submit(2, False, [1])
    rig.finish(2)
    assert rig.coordinator.counters.num_checksum_failures == 1
    assert not rig.coordinator.breaker.is_open


def test_a_write_that_fails_leaves_the_slot_empty(make):
    rig = make()
    rig.written(range(3))
    rig.disk.fails = lambda op: op.is_write
    rig.submit(1, True, [1])
    rig.finish(1)
    assert rig.results[1].failed_keys == (key_of(1),)
    assert rig.slab.record(1) is None
    assert rig.coordinator.counters.num_write_errors == 1


def test_a_slots_record_is_gone_before_its_data_is_overwritten(make):
    rig = make()
    rig.written(range(1))
    rig.disk.seconds = lambda op: 5.0
    rig.submit(1, True, range(1))
    rig.step(0.0)
    assert len(rig.disk.started) == 1
    index = rig.slab.path.with_suffix(".index").read_bytes()
    assert not any(index[4096 : 4096 + 128])
    rig.finish(1)
    assert any(rig.slab.path.with_suffix(".index").read_bytes()[4096 : 4096 + 128])


def test_what_is_forgotten_while_it_is_written_is_not_recorded(make):
    rig = make(max_in_flight=1)
    rig.submit(1, True, [1, 2])
    rig.step(0.0)
    rig.forget(1, 2)
    rig.submit(2, True, [3])
    rig.finish(1, 2)
    assert rig.results[1].failed_keys == (key_of(1), key_of(2))
    assert [rig.slab.record(slot) is None for slot in (1, 2, 3)] == [True, True, False]


def test_a_write_after_a_forget_counts(make):
    rig = make(max_in_flight=1)
    rig.submit(1, True, [1])
    rig.forget(1)
    rig.submit(2, True, [1])
    rig.finish(1, 2)
    assert rig.results[1].failed_keys == rig.results[2].done_keys == (key_of(1),)
    assert rig.slab.record(1) is not None


def test_clearing_voids_what_is_under_way(make):
    rig = make(max_in_flight=2)
    rig.written(range(5))
    rig.submit(1, False, range(5))
    rig.submit(2, True, range(10, 15))
    rig.step(0.0)
    rig.forget()
    rig.submit(3, True, [20])
    rig.finish(1, 2, 3)
    assert rig.results[1].done_keys == rig.results[2].done_keys == ()
    assert [slot for slot in range(30) if rig.slab.record(slot) is not None] == [20]


def test_what_cannot_be_forgotten_on_disk_is_said_once_and_forgotten_here(make, caplog: pytest.LogCaptureFixture):
    rig = make()
    rig.written(range(3))
    index_fd = rig.slab._index_fd
    rig.slab._index_fd = os.open(rig.slab.path.with_suffix(".index"), os.O_RDONLY)
    rig.forget(1, 2)
    rig.submit(1, False, range(3))
    rig.finish(1)
    os.close(rig.slab._index_fd)
    rig.slab._index_fd = index_fd
    assert rig.results[1].failed_keys == (key_of(1), key_of(2))
    assert rig.coordinator.counters.num_write_errors == 2
    assert caplog.text.count("cannot forget 2 slots on disk") == 1


def test_a_slab_that_cannot_be_emptied_is_not_used_any_more(make, caplog: pytest.LogCaptureFixture):
    rig = make()
    rig.written(range(3))
    index_fd = rig.slab._index_fd
    rig.slab._index_fd = os.open(rig.slab.path.with_suffix(".index"), os.O_RDONLY)
    rig.forget()
    rig.step(0.0)
    os.close(rig.slab._index_fd)
    rig.slab._index_fd = index_fd
    rig.submit(1, True, [4])  # maybe of other weights: a restart would find it among those of before
    rig.submit(2, False, range(3))
    rig.finish(1, 2)
    assert rig.results[1].untried_keys == (key_of(4),)
    assert len(rig.results[2].untried_keys) == 3
    assert rig.coordinator.breaker.is_dead
    assert "cannot be emptied, so it is not used any more" in caplog.text


def test_a_slot_is_never_written_beside_another_op_on_it(make):
    rig = make()
    rig.written(range(4))
    draw = random.Random(3)
    for job_id in range(200):
        rig.submit(job_id, draw.random() < 0.5, draw.sample(range(4), 2))
    rig.disk.seconds = lambda op: draw.uniform(0.001, 0.1)
    rig.finish(*range(200))
    assert rig.disk.most_in_flight > 4, "the disk itself asserts that no op is in a writer's way"
    assert all(rig.slab.record(slot) is not None for slot in range(4))
    assert rig.coordinator.counters.num_checksum_failures == 0


def test_a_read_of_what_is_just_being_written_waits_for_it(make):
    rig = make()
    rig.disk.seconds = lambda op: 3.0 if op.is_write else 0.001
    rig.submit(1, True, [1])
    rig.step(0.0)
    rig.submit(2, False, [1])
    rig.finish(1, 2)
    assert rig.results[2].done_keys == (key_of(1),)


def test_an_error_run_opens_the_breaker_and_gives_the_rest_back(make):
    rig = make(max_in_flight=1, max_consecutive_errors=3)
    rig.written(range(10))
    rig.disk.fails = lambda op: True
    rig.submit(1, False, range(10))
    rig.submit(2, False, range(10))
    rig.submit(3, True, range(20, 25))
    rig.finish(1, 2, 3)
    assert len(rig.results[1].failed_keys) == 3
    assert len(rig.results[1].untried_keys) == 7
    assert len(rig.results[2].untried_keys) == 10
    assert len(rig.results[3].untried_keys) == 5
    assert rig.coordinator.breaker.is_open
    assert rig.slab.record(9) is not None, "what was not tried is still there"


def test_an_open_breaker_gives_jobs_back_at_once(make):
    rig = make(max_in_flight=1, max_consecutive_errors=1)
    rig.disk.fails = lambda op: True
    rig.submit(1, True, [1])
    rig.finish(1)
    before = rig.clock.now
    rig.submit(2, False, [1])
    rig.submit(3, True, [1])
    rig.step(0.0)
    assert set(rig.results) == {1, 2, 3}
    assert rig.results[2].cancelled
    assert rig.clock.now == before


def test_a_disk_that_works_again_is_found_by_a_probe(make):
    rig = make(max_in_flight=1, max_consecutive_errors=1)
    rig.written(range(2))
    rig.disk.fails = lambda op: True
    rig.submit(1, True, [5])
    rig.finish(1)
    opened_s = rig.clock.now
    rig.disk.started.clear()
    rig.run_until(opened_s + 100.0)
    assert [now - opened_s for now, _ in rig.disk.started] == pytest.approx([30.0, 90.0], abs=0.1)
    rig.disk.fails = lambda op: False
    rig.until(lambda: not rig.coordinator.breaker.is_open)
    assert rig.clock.now - opened_s == pytest.approx(210.0, abs=0.1)
    assert all(op.offset_bytes == rig.slab.probe_offset_bytes for _, op in rig.disk.started)
    rig.submit(2, False, range(2))
    rig.finish(2)
    assert len(rig.results[2].done_keys) == 2


@pytest.mark.parametrize("dies", [False, True])
def test_a_disk_works_again_only_where_it_is_used_again(make, dies: bool, caplog: pytest.LogCaptureFixture):
    rig = make(max_consecutive_errors=1)
    rig.disk.fails = lambda op: True
    rig.submit(1, True, [5])
    rig.finish(1)
    rig.disk.fails = lambda op: False
    rig.disk.started.clear()
    rig.until(lambda: bool(rig.disk.started))
    if dies:
        rig.coordinator.breaker.kill()  # the probe is at the disk
    with caplog.at_level("INFO"):
        rig.run_until(rig.clock.now + 10.0)
    assert rig.coordinator.breaker.is_open == dies
    assert ("the disk works again" in caplog.text) != dies


def test_a_disk_that_loses_what_is_written_does_not_pass_the_probe(make):
    rig = make(max_consecutive_errors=1)
    rig.disk.fails = lambda op: True
    rig.submit(1, True, [5])
    rig.finish(1)
    rig.disk.fails = lambda op: False
    move = rig.disk._move
    rig.disk._move = lambda op: None if op.is_write else move(op)
    rig.run_until(rig.clock.now + 40.0)
    assert rig.disk.started[-1][1].offset_bytes == rig.slab.probe_offset_bytes
    assert rig.coordinator.breaker.is_open


def test_a_read_without_an_answer_opens_the_breaker_when_it_is_stuck(make):
    rig = make(stuck_s=5.0)
    rig.written(range(20))
    rig.disk.seconds = lambda op: math.inf
    before = rig.clock.now
    rig.submit(1, False, range(20))
    rig.submit(2, False, range(20))
    rig.run_until(before + 4.99)
    assert not rig.coordinator.breaker.is_open
    rig.run_until(before + 5.0)
    rig.step(0.0)
    assert rig.coordinator.breaker.is_open
    assert rig.results[2].cancelled
    assert 1 not in rig.results, "its buffers are still in use"


def test_a_slow_read_comes_back_after_the_breaker_opened_and_then_a_probe_closes_it(make):
    rig = make(stuck_s=5.0)
    rig.written(range(2))
    rig.disk.seconds = lambda op: 100.0
    rig.submit(1, False, range(2))
    before = rig.clock.now
    rig.until(lambda: rig.coordinator.breaker.is_open)
    rig.disk.seconds = lambda op: 0.001
    rig.finish(1)
    assert rig.clock.now - before == pytest.approx(100.0)
    assert len(rig.results[1].done_keys) == 2, "late, and still right"
    assert rig.coordinator.breaker.is_open, "no probe while the disk owes an answer"
    rig.step()
    rig.step()
    assert not rig.coordinator.breaker.is_open


def test_a_slow_write_opens_nothing(make):
    rig = make(stuck_s=5.0)
    rig.disk.seconds = lambda op: 100.0
    rig.submit(1, True, range(2))
    rig.finish(1)
    assert len(rig.results[1].done_keys) == 2
    assert not rig.coordinator.breaker.is_open


def test_stopping_waits_for_the_disk_and_keeps_what_it_did(make, tmp_path: Path):
    rig = make(max_in_flight=3, max_writes_in_flight=3)
    rig.submit(1, True, range(10))
    rig.step(0.0)
    rig.forget(7)
    rig.coordinator.stop()
    rig.step = None  # type: ignore[assignment]
    result = rig.coordinator.results.popleft()
    assert len(result.done_keys) == 3
    assert len(result.untried_keys) == 7
    slab = Slab.open(tmp_path, 4 << 20, SLOT_BYTES, "a")
    assert slab.recovered == {key_of(slot): slot for slot in range(3)}
    slab.close()


def test_the_wear_is_on_disk_within_seconds(make, tmp_path: Path):
    rig = make()
    rig.written(range(5))
    rig.run_until(rig.clock.now + 2.0)
    os.close(rig.slab._index_fd)  # the process dies
    os.close(rig.slab.fd)
    rig.disk.close()
    rig.slab._is_closed = True
    slab = Slab.open(tmp_path, 4 << 20, SLOT_BYTES, "a")
    assert slab.wear == (20_000, 5 * SLOT_BYTES, 5 * SLOT_BYTES)
    slab.close()


def test_an_idle_coordinator_wakes_only_for_what_is_due(make):
    rig = make()
    rig.written(range(2))
    before, num_steps = rig.clock.now, 0
    while rig.clock.now < before + 1000.0:
        rig.step()
        num_steps += 1
    assert num_steps <= 1000 / 60 + 3, "the wear is saved once"


def test_bandwidth_is_what_the_disk_gives(make):
    rig = make(max_in_flight=4)
    rig.written(range(100))
    rig.disk.seconds = lambda op: 0.004
    rig.submit(1, False, range(100))
    rig.finish(1)
    assert rig.coordinator.flights.read_meter.bytes_per_s == pytest.approx(4 * SLOT_BYTES / 0.004, rel=0.1)

"""What starts when, and under which bounds."""

import random

import pytest

from impala_vllm.transfer.messages import Withdraw
from tests.transfer.coordinator.rig import SLOT_BYTES, data_of, key_of


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

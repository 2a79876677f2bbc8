"""What a slab says it holds, while slots are read, written, lost and forgotten."""

import os
from pathlib import Path

import pytest

from impala_vllm.transfer.slab import Slab
from tests.transfer.coordinator.rig import SLOT_BYTES, key_of


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

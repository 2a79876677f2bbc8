"""What is asked of a store, and what the engine's thread is told of it."""

import os
import random

import pytest

from impala_vllm.transfer.alignment import aligned_buffer
from impala_vllm.transfer.jobs import Item, Result
from impala_vllm.transfer.limits import Limits
from tests.transfer.finishing import LONG_S, finish
from tests.transfer.nvme_store.items import SLOT_BYTES, data_of, key_of, to_read, to_write


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

"""What becomes of a store whose files are cut, removed or full, and of what it was told to forget."""

import os
import resource
import shutil
from pathlib import Path

from impala_vllm.transfer.limits import Limits
from tests.transfer.finishing import finish
from tests.transfer.nvme_store.items import SLOT_BYTES, data_of, key_of, to_read, to_write


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

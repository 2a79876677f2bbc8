"""The slab's files: their sizes and rights, what a restart finds, and the wear of a day."""

import logging
import os
import stat
from pathlib import Path

import pytest

from impala_vllm.transfer.slab import Slab
from tests.transfer.slabs import BUDGET_BYTES, SLOT_BYTES, index_of, opened


@pytest.mark.parametrize("slot_bytes", [1, 1000, 4096, 65536, 100_000])
def test_both_files_stay_inside_the_budget_and_use_most_of_it(tmp_path: Path, slot_bytes: int):
    for num_bytes in (200_000, 1 << 20, (1 << 20) + 4095, 3_333_333):
        slab = opened(tmp_path, num_bytes, slot_bytes)
        used = sum(os.stat(path).st_blocks * 512 for path in (slab.path, index_of(slab)))
        assert used <= num_bytes
        assert slab.num_slots * slot_bytes + 16384 + (slab.num_slots + 1) * 128 + slot_bytes >= num_bytes
        assert slab.offset_bytes(slab.num_slots - 1) + slot_bytes <= slab.probe_offset_bytes
        slab.close()


def test_space_is_taken_at_open_not_when_it_is_written(tmp_path: Path):
    slab = opened(tmp_path, 8 << 20)
    assert os.stat(slab.path).st_blocks * 512 >= slab.num_slots * SLOT_BYTES
    slab.close()


def test_directory_and_files_are_for_the_owner_only(tmp_path: Path):
    slab = opened(tmp_path / "a" / "b")
    assert stat.S_IMODE(os.stat(tmp_path / "a" / "b").st_mode) == 0o700
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in (slab.path, index_of(slab))} == {0o600}
    slab.close()


def test_what_was_committed_is_found_after_a_restart_oldest_first(tmp_path: Path):
    slab = opened(tmp_path)
    for slot in (7, 3, 5):
        slab.commit(slot, b"key%d" % slot, 100 + slot, 1 << 63 | slot)
    slab.commit(9, b"gone", 1, 1)
    slab.invalidate(9)
    slab.close()
    slab = opened(tmp_path)
    assert list(slab.recovered.items()) == [(b"key7", 7), (b"key3", 3), (b"key5", 5)]
    record = slab.record(5)
    assert record is not None
    assert record[:3] == (b"key5", 105, 1 << 63 | 5)
    assert (slab.record(9), slab.dropped, slab.num_torn) == (None, None, 0)
    slab.close()


def test_a_process_that_dies_loses_nothing_that_was_committed(tmp_path: Path):
    slab = opened(tmp_path)
    slab.commit(1, b"key", 10, 20)
    os.close(slab._index_fd)
    os.close(slab.fd)
    slab = opened(tmp_path)
    assert slab.recovered == {b"key": 1}
    slab.close()


def test_a_key_written_twice_is_found_where_it_was_written_last_for_good(tmp_path: Path):
    slab = opened(tmp_path)
    slab.commit(1, b"key", 10, 20)
    slab.commit(2, b"key", 10, 20)
    slab.close()
    slab = opened(tmp_path)
    assert slab.recovered == {b"key": 2}
    slab.invalidate(2)
    slab.close()
    slab = opened(tmp_path)
    assert slab.recovered == {}, "the earlier write must not come back"
    slab.close()


def test_a_cleared_slab_holds_nothing_after_a_restart(tmp_path: Path):
    slab = opened(tmp_path)
    slab.commit(1, b"key", 10, 20)
    slab.clear()
    assert slab.record(1) is None
    slab.commit(2, b"other", 10, 20)
    slab.close()
    slab = opened(tmp_path)
    assert slab.recovered == {}, "it may be of weights that were only in memory"
    assert "after a reset" in (slab.dropped or "")
    slab.commit(3, b"key", 10, 20)
    slab.close()
    slab = opened(tmp_path)
    assert (slab.recovered, slab.dropped) == ({b"key": 3}, None)
    slab.close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"namespace": "b"}, "another model"),
        ({"slot_bytes": 8192}, "4096 bytes, not 8192"),
        ({"num_bytes": 2 * BUDGET_BYTES}, "slots"),
        ({"num_bytes": BUDGET_BYTES // 2}, "slots"),
    ],
)
def test_a_slab_of_something_else_starts_empty_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict, reason: str
):
    slab = opened(tmp_path)
    slab.commit(1, b"key", 10, 20)
    slab.close()
    with caplog.at_level(logging.WARNING, "vllm.impala"):
        slab = opened(tmp_path, **change)
    assert slab.recovered == {}
    assert slab.record(1) is None
    assert reason in (slab.dropped or "")
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    assert sum(os.stat(p).st_size for p in (slab.path, index_of(slab))) <= change.get("num_bytes", BUDGET_BYTES)
    slab.close()
    slab = opened(tmp_path)
    assert slab.recovered == {}, "nor may it come back with the first settings"
    slab.close()


def test_a_new_slab_has_dropped_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    slab = opened(tmp_path)
    assert (slab.recovered, slab.dropped) == ({}, None)
    assert caplog.records == []
    slab.close()


def test_it_is_direct_only_where_slots_allow_and_nobody_minds(tmp_path: Path):
    odd = opened(tmp_path / "odd", slot_bytes=1000)
    assert not odd.is_direct
    odd.close()
    buffered = Slab.open(tmp_path / "buffered", BUDGET_BYTES, SLOT_BYTES, "a", direct=False)
    assert not buffered.is_direct
    buffered.close()


def test_the_wear_of_a_day_is_counted_over_restarts_and_namespaces(tmp_path: Path):
    slab = opened(tmp_path)
    slab.add_written(1000, day=20_000)
    slab.add_written(500, day=20_000)
    slab.close()
    slab = opened(tmp_path, namespace="b")
    assert slab.wear == (20_000, 1500, 1500)
    slab.add_written(7, day=20_001)
    slab.clear()
    slab.close()
    slab = opened(tmp_path, namespace="b")
    assert slab.wear == (20_001, 7, 1507)
    slab.close()


def test_close_is_idempotent_and_leaves_no_descriptor(tmp_path: Path):
    before = len(os.listdir("/proc/self/fd"))
    slab = opened(tmp_path)
    slab.close()
    slab.close()
    assert len(os.listdir("/proc/self/fd")) == before

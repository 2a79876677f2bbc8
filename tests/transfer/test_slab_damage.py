"""Other people's damage to a slab's files costs what was damaged, and never makes a record up."""

import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.transfer.slabs import index_of, opened


@pytest.mark.parametrize("which", ["data", "index"])
@pytest.mark.parametrize("size", [0, 100, 5000, 10_000_000])
def test_a_file_of_the_wrong_size_starts_the_slab_empty(tmp_path: Path, which: str, size: int):
    slab = opened(tmp_path)
    slab.commit(1, b"key", 10, 20)
    slab.close()
    os.truncate(slab.path if which == "data" else index_of(slab), size)
    slab = opened(tmp_path)
    assert slab.recovered == {}
    assert slab.dropped is not None
    slab.commit(1, b"key", 10, 20)
    slab.close()
    slab = opened(tmp_path)
    assert slab.recovered == {b"key": 1}
    slab.close()


def test_a_removed_file_starts_the_slab_empty(tmp_path: Path):
    for victim in (lambda slab: slab.path, index_of):
        slab = opened(tmp_path)
        slab.commit(1, b"key", 10, 20)
        slab.close()
        victim(slab).unlink()
        slab = opened(tmp_path)
        assert slab.recovered == {}
        slab.close()


def test_torn_records_are_dropped_counted_and_not_counted_again(tmp_path: Path):
    slab = opened(tmp_path)
    for slot in range(10):
        slab.commit(slot, b"key%d" % slot, 10, 20)
    slab.close()
    data = bytearray(index_of(slab).read_bytes())
    for slot in (2, 5):
        data[4096 + 128 * slot + 70] ^= 4
    index_of(slab).write_bytes(data)
    slab = opened(tmp_path)
    assert set(slab.recovered.values()) == {0, 1, 3, 4, 6, 7, 8, 9}
    assert slab.num_torn == 2
    slab.close()
    slab = opened(tmp_path)
    assert (len(slab.recovered), slab.num_torn) == (8, 0)
    slab.close()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.integers(0, 2**32), st.integers(1, 2000))
def test_noise_in_the_index_never_makes_a_record_up(tmp_path: Path, seed: int, length: int):
    for path in tmp_path.iterdir():
        path.unlink()
    slab = opened(tmp_path)
    expected = {b"key%d" % slot: slot for slot in range(100)}
    for key, slot in expected.items():
        slab.commit(slot, key, 10, 20)
    slab.close()
    draw = random.Random(seed)
    data = bytearray(index_of(slab).read_bytes())
    start = draw.randrange(len(data) - length)
    data[start : start + length] = draw.randbytes(length)
    index_of(slab).write_bytes(data)
    slab = opened(tmp_path)
    assert slab.recovered.items() <= expected.items()
    slab.close()

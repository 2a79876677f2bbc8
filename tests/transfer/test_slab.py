"""The slab's files: sizes, restarts, locks, other people's damage, and errors that say what to do."""

import logging
import os
import random
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from impala_vllm.transfer.slab import Slab, SlabError

SLOT_BYTES = 4096
BUDGET_BYTES = 1 << 20


def opened(directory: Path, num_bytes: int = BUDGET_BYTES, slot_bytes: int = SLOT_BYTES, namespace: str = "a") -> Slab:
    return Slab.open(directory, num_bytes, slot_bytes, namespace)


def index_of(slab: Slab) -> Path:
    return slab.path.with_suffix(".index")


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


def test_a_second_opener_is_told_and_the_first_not_disturbed(tmp_path: Path):
    slab = opened(tmp_path)
    with pytest.raises(SlabError, match=r"impala-0\.slab is in use .*directory of its own"):
        Slab.open(tmp_path, BUDGET_BYTES, SLOT_BYTES, "a", wait_s=0.0)
    with pytest.raises(SlabError, match="in use"):
        Slab.open(tmp_path, BUDGET_BYTES, SLOT_BYTES, "b", wait_s=0.0)
    slab.commit(1, b"key", 10, 20)
    slab.close()
    slab = opened(tmp_path)
    assert slab.recovered == {b"key": 1}
    slab.close()


def test_a_slab_that_is_given_up_while_it_is_waited_for_is_opened(tmp_path: Path):
    first = opened(tmp_path)
    first.commit(1, b"key", 10, 20)
    found: list[Slab] = []
    waiter = threading.Thread(
        target=lambda: found.append(Slab.open(tmp_path, BUDGET_BYTES, SLOT_BYTES, "a", wait_s=60))
    )
    waiter.start()
    first.close()
    waiter.join()
    assert found[0].recovered == {b"key": 1}
    found[0].close()


def test_a_closed_slab_is_free_though_a_duplicate_of_its_descriptor_lives(tmp_path: Path):
    slab = opened(tmp_path)
    duplicate = os.dup(slab.fd)
    slab.close()
    Slab.open(tmp_path, BUDGET_BYTES, SLOT_BYTES, "a", wait_s=0.0).close()
    os.close(duplicate)


def test_slabs_of_two_names_share_a_directory(tmp_path: Path):
    first = Slab.open(tmp_path, BUDGET_BYTES, SLOT_BYTES, "a", name="0")
    second = Slab.open(tmp_path, BUDGET_BYTES, SLOT_BYTES, "a", name="1")
    first.commit(1, b"key", 10, 20)
    first.close()
    second.close()
    second = Slab.open(tmp_path, BUDGET_BYTES, SLOT_BYTES, "a", name="1")
    assert second.recovered == {}
    second.close()


def test_the_lock_goes_with_the_process(tmp_path: Path):
    program = (
        "import sys; from impala_vllm.transfer.slab import Slab\n"
        f"slab = Slab.open(sys.argv[1], {BUDGET_BYTES}, {SLOT_BYTES}, 'a'); slab.commit(1, b'key', 10, 20)\n"
        "print('open', flush=True); sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "open\n"
    with pytest.raises(SlabError, match="in use"):
        Slab.open(tmp_path, BUDGET_BYTES, SLOT_BYTES, "a", wait_s=0.0)
    child.kill()
    child.communicate()
    slab = opened(tmp_path)
    assert slab.recovered == {b"key": 1}
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


def test_a_budget_below_one_slot_is_an_error_that_names_the_least(tmp_path: Path):
    with pytest.raises(SlabError, match="raise it to") as caught:
        opened(tmp_path / "x", num_bytes=SLOT_BYTES)
    least = int(str(caught.value).split("raise it to ")[1].split()[0])
    assert not (tmp_path / "x").exists()
    slab = opened(tmp_path / "x", num_bytes=least)
    assert slab.num_slots == 1
    slab.close()


def test_a_disk_without_room_is_an_error_and_is_left_as_it_was(tmp_path: Path):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(SlabError, match=r"No space.*free some space, lower the NVMe budget") as caught:
        opened(tmp_path, num_bytes=free + (1 << 40), slot_bytes=64 << 20)
    assert "\n" not in str(caught.value)
    assert all(path.stat().st_size == 0 for path in tmp_path.iterdir())


def test_a_real_full_file_system_is_an_error(tmp_path: Path):
    program = (
        "import sys; from impala_vllm.transfer import slab\n"
        "slab._check_room = lambda fd, num_bytes: None  # as if others took the room in between\n"
        f"try: slab.Slab.open(sys.argv[1], 8 << 20, {SLOT_BYTES}, 'a')\n"
        "except slab.SlabError as error: print(error)\n"
    )
    mount = f'mount -t tmpfs -o size=2m none "{tmp_path}" || exit 77; exec "$@"'
    run = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == 77 or "unshare" in run.stderr:
        pytest.skip("no file system can be mounted here")
    assert "No space left on device; free some space" in run.stdout, run.stderr


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("file", "not a directory"),
        ("file/below", "a part of the path is a file"),
        ("/proc/impala", "choose another directory"),
        ("link", "symbolic link"),
        ("taken", "a directory has the file's name"),
    ],
)
def test_a_place_that_cannot_be_used_is_one_line_with_advice(tmp_path: Path, where: str, what: str):
    (tmp_path / "file").touch()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "impala-0.slab").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "taken" / "impala-0.slab").mkdir(parents=True)
    with pytest.raises(SlabError, match=what) as caught:
        opened(tmp_path / where)
    assert "\n" not in str(caught.value)
    assert where in str(caught.value)
    assert not (tmp_path / "elsewhere").exists()


def test_a_failed_open_keeps_no_descriptor_and_no_lock(tmp_path: Path):
    (tmp_path / "impala-0.index").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SlabError):
        opened(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    (tmp_path / "impala-0.index").rmdir()
    opened(tmp_path).close()

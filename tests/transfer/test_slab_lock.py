"""A slab is one process's at a time, and free as soon as that one is done with it."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from impala_vllm.transfer.slab import Slab, SlabError
from tests.transfer.slabs import BUDGET_BYTES, SLOT_BYTES, opened


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


def test_a_failed_open_keeps_no_descriptor_and_no_lock(tmp_path: Path):
    (tmp_path / "impala-0.index").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SlabError):
        opened(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    (tmp_path / "impala-0.index").rmdir()
    opened(tmp_path).close()

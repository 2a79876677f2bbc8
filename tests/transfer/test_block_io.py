"""Which engine a file gets."""

import errno
import os
from pathlib import Path

import pytest

from impala_vllm import native
from impala_vllm.transfer.alignment import aligned_buffer, use_direct
from impala_vllm.transfer.block_io import Completion, Op, open_block_io
from impala_vllm.transfer.thread_pool_io import ThreadPoolIo
from impala_vllm.transfer.uring_io import UringIo


@pytest.fixture
def fd(tmp_path: Path):
    path = tmp_path / "data"
    path.write_bytes(bytes(8192))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def test_a_buffered_file_gets_threads(fd: int):
    io = open_block_io(fd)
    assert isinstance(io, ThreadPoolIo)
    io.close()


def test_a_direct_file_gets_io_uring_where_there_is_one(fd: int, tmp_path: Path):
    if not use_direct(fd):
        pytest.skip("the file system has no direct I/O")
    io = open_block_io(fd)
    has_io_uring = hasattr(native._native(), "UringFile") and bool(native.probe_block_io(tmp_path).io_uring)
    assert isinstance(io, UringIo if has_io_uring else ThreadPoolIo)
    assert io.alignment_bytes == 4096
    io.close()


def test_without_io_uring_a_direct_file_gets_threads(fd: int, monkeypatch: pytest.MonkeyPatch):
    if not use_direct(fd):
        pytest.skip("the file system has no direct I/O")

    def refuse(*_: object) -> None:
        raise PermissionError(1, "io_uring is forbidden here")

    monkeypatch.setattr(native, "open_uring_file", refuse)
    io = open_block_io(fd)
    assert isinstance(io, ThreadPoolIo)
    assert io.is_direct
    io.close()


def test_memory_that_most_ops_use_is_registered_where_it_may_be(fd: int, tmp_path: Path):
    if not use_direct(fd) or not native.probe_block_io(tmp_path).io_uring:
        pytest.skip("no io_uring here")
    region = aligned_buffer(8192)
    io = open_block_io(fd, 4, deadline_s=60.0, region=region)
    assert io.name == "io_uring, registered memory"
    io.submit([Op(1, True, 4096, region[4096:]), Op(2, False, 0, region[:4096])])
    done: list[Completion] = []
    while len(done) < 2:
        done += io.poll(60.0)
    assert [c.error for c in done] == [None, None]
    io.close()


def test_where_memory_cannot_be_registered_the_work_is_done_without(
    fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not use_direct(fd) or not native.probe_block_io(tmp_path).io_uring:
        pytest.skip("no io_uring here")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "above `ulimit -l`")

    monkeypatch.setattr(UringIo, "register_region", refuse)
    io = open_block_io(fd, region=aligned_buffer(8192))
    assert io.name == "io_uring"
    buffer = aligned_buffer(4096)
    io.submit([Op(1, False, 0, buffer)])
    assert [c.error for c in io.poll(60.0)] == [None]
    io.close()

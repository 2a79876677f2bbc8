"""Which engine a file gets."""

import os
from pathlib import Path

import pytest

from impala_vllm import native
from impala_vllm.transfer.alignment import use_direct
from impala_vllm.transfer.block_io import open_block_io
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

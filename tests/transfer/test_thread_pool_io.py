"""The thread pool passes the contract; and its threads are as promised."""

import os
import threading
from pathlib import Path

from impala_vllm.transfer.alignment import aligned_buffer, use_direct
from impala_vllm.transfer.block_io import BlockIo, Op
from impala_vllm.transfer.thread_pool_io import ThreadPoolIo
from tests.contracts.block_io import BlockIoContract, collect


class TestThreadPool(BlockIoContract):
    def make(self, fd: int) -> BlockIo:
        return ThreadPoolIo(fd, num_threads=3)


class TestOneThread(BlockIoContract):
    def make(self, fd: int) -> BlockIo:
        return ThreadPoolIo(fd, num_threads=1)


def test_threads_are_named_daemons_and_gone_after_close(tmp_path: Path):
    fd = os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT)
    io = ThreadPoolIo(fd, num_threads=2)
    workers = [t for t in threading.enumerate() if t.name.startswith("impala-block-io-")]
    assert {t.name for t in workers} == {"impala-block-io-0", "impala-block-io-1"}
    assert all(t.daemon for t in workers)
    io.close()
    os.close(fd)
    assert not any(t.is_alive() for t in workers)


def test_it_says_whether_it_is_direct(tmp_path: Path):
    path = tmp_path / "data"
    path.write_bytes(bytes(8192))
    fd = os.open(path, os.O_RDWR)
    buffered = ThreadPoolIo(fd, num_threads=1)
    assert (buffered.is_direct, buffered.alignment_bytes) == (False, 1)
    buffered.close()
    is_direct = use_direct(fd)
    io = ThreadPoolIo(fd, num_threads=1)
    assert (io.is_direct, io.alignment_bytes) == (is_direct, 4096 if is_direct else 1)
    io.close()
    os.close(fd)


def test_a_buffer_released_under_it_is_an_error_not_a_hang(tmp_path: Path):
    path = tmp_path / "data"
    path.write_bytes(bytes(8192))
    fd = os.open(path, os.O_RDWR)
    io = ThreadPoolIo(fd, num_threads=0)
    buffer = aligned_buffer(4096)
    io.submit([Op(1, False, 0, buffer)])
    buffer.release()
    io._todo.put(None)
    io._work()  # as a worker would
    assert isinstance(collect(io, 1)[1].error, OSError)
    io.close()
    os.close(fd)

"""Which engine a file gets."""

import errno
import os
import subprocess
import sys
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


def test_where_a_ring_can_be_made_but_moves_nothing_threads_do_the_work(
    fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    if not use_direct(fd) or not native.probe_block_io(tmp_path).io_uring:
        pytest.skip("no io_uring here")
    closed: list[UringIo] = []
    close = UringIo.close
    forbidden = Completion(0, PermissionError(errno.EPERM, "io_uring_enter is forbidden here"), None, 0.0)
    monkeypatch.setattr(UringIo, "poll", lambda self, timeout_s: [forbidden])
    monkeypatch.setattr(UringIo, "close", lambda self: (closed.append(self), close(self)))
    with caplog.at_level("INFO", "vllm.impala"):
        io = open_block_io(fd)
    assert isinstance(io, ThreadPoolIo)
    assert len(closed) == 1
    assert "io_uring_enter is forbidden here" in caplog.text
    buffer = aligned_buffer(4096)
    io.submit([Op(1, False, 0, buffer)])
    assert [c.error for c in io.poll(60.0)] == [None]
    io.close()


def test_where_a_ring_takes_ops_and_never_answers_threads_do_the_work_and_no_op_is_left_with_it(
    fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not use_direct(fd) or not native.probe_block_io(tmp_path).io_uring:
        pytest.skip("no io_uring here")

    def forbidden(self: UringIo, ops: object) -> None:
        raise AssertionError("the file was asked: its engine could never be closed")

    monkeypatch.setattr(native, "can_use_io_uring", lambda: False)
    monkeypatch.setattr(UringIo, "submit", forbidden)
    io = open_block_io(fd)
    assert isinstance(io, ThreadPoolIo)
    io.close()


UNDER_A_FILTER = """
import ctypes, os, struct, sys
from impala_vllm import native
from impala_vllm.transfer.alignment import aligned_buffer, use_direct
from impala_vllm.transfer.block_io import Op, open_block_io

# Load the system call's number; one is EPERM; all others are allowed.
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, int(sys.argv[2])), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
rules = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(rules))
libc = ctypes.CDLL(None, use_errno=True)
no_new_privileges, set_filter = 38, 22
if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_filter, 2, program, 0, 0):
    sys.exit(77)
fd = os.open(sys.argv[1], os.O_RDWR)
use_direct(fd)
io = open_block_io(fd)
io.submit([Op(1, False, 0, aligned_buffer(4096))])
print(type(io).__name__, [c.error for c in io.poll(60.0)])
io.close()
print("probed", native.probe_block_io(os.path.dirname(sys.argv[1])).io_uring)
"""


@pytest.mark.parametrize("refused", [425, 426, 427], ids=["io_uring_setup", "io_uring_enter", "io_uring_register"])
def test_under_a_filter_that_refuses_a_call_of_io_uring_threads_do_the_work_and_the_probe_says_so(
    fd: int, tmp_path: Path, refused: int
):
    if not use_direct(fd) or not native.probe_block_io(tmp_path).io_uring:
        pytest.skip("no io_uring here")
    child = [sys.executable, "-c", UNDER_A_FILTER, str(tmp_path / "data"), str(refused)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(child, capture_output=True, text=True, env=env, timeout=120)
    if done.returncode == 77:
        pytest.skip("the kernel takes no seccomp filter of ours")
    assert done.stdout == "ThreadPoolIo [None]\nprobed False\n", done.stdout + done.stderr[-2000:]


def test_the_proof_leaves_nothing_in_flight_and_no_completion_behind(fd: int, tmp_path: Path):
    if not use_direct(fd) or not native.probe_block_io(tmp_path).io_uring:
        pytest.skip("no io_uring here")
    io = open_block_io(fd)
    assert isinstance(io, UringIo)
    assert io.num_in_flight == 0
    assert io.poll(0.0) == []
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

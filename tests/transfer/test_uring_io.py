"""io_uring passes the contract, and does what is its own: long batches, calling ops back, deadlines, held buffers.

A pipe stands in for a disk that does not answer.
"""

import errno
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from impala_vllm import native
from impala_vllm.transfer.alignment import aligned_buffer, use_direct
from impala_vllm.transfer.block_io import BlockIo, Op
from impala_vllm.transfer.uring_io import UringIo
from tests.contracts.block_io import BLOCK_BYTES, LONG_S, BlockIoContract, collect, filled


def refusal() -> str | None:
    """Why there is no io_uring here; None: there is."""
    fd = os.open(os.devnull, os.O_RDWR)
    try:
        UringIo(fd).close()
    except OSError as error:
        return f"no io_uring here: {error}"
    finally:
        os.close(fd)
    return None


needs_io_uring = pytest.mark.skipif(bool(refusal()), reason=refusal() or "")


@needs_io_uring
class TestUring(BlockIoContract):
    def make(self, fd: int) -> BlockIo:
        return UringIo(fd)


@needs_io_uring
class TestASmallRing(BlockIoContract):
    def make(self, fd: int) -> BlockIo:
        return UringIo(fd, depth=3)


@needs_io_uring
class TestChecksumsByPython(BlockIoContract):
    @pytest.fixture(autouse=True)
    def build_without_checksums(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "has_checksum", lambda: False)

    def make(self, fd: int) -> BlockIo:
        return UringIo(fd)


class Pipe:
    """Two ends, closed at the end of a test."""

    def __init__(self) -> None:
        self.out, self._in = os.pipe()

    def feed(self, num_blocks: int = 1) -> None:
        """The bytes that the next reads get."""
        for _ in range(num_blocks):
            os.write(self._in, b"\x01" * BLOCK_BYTES)

    def close(self) -> None:
        os.close(self.out)
        os.close(self._in)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def reads(*buffers: bytearray) -> list[Op]:
    return [Op(token, False, 0, memoryview(buffer)) for token, buffer in enumerate(buffers)]


@needs_io_uring
def test_many_batches_are_in_flight_at_once(tmp_path: Path):
    fd = os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT)
    os.truncate(fd, 4 << 20)
    use_direct(fd)
    io = UringIo(fd, depth=16)
    rng = random.Random(1)
    content = {i: filled(BLOCK_BYTES, i) for i in range(1000)}
    for start in range(0, 1000, 100):
        io.submit([Op(i, True, i * BLOCK_BYTES, content[i]) for i in range(start, start + 100)])
    assert all(c.error is None for c in collect(io, 1000).values())
    into = {i: aligned_buffer(BLOCK_BYTES) for i in range(1000)}
    found: set[int] = set()
    todo = rng.sample(range(1000), 1000)
    while len(found) < 1000:
        batch, todo = todo[:70], todo[70:]
        io.submit([Op(i, False, i * BLOCK_BYTES, into[i]) for i in batch])
        found |= {c.token for c in io.poll(LONG_S) if c.error is None}
    assert into == content
    io.close()
    os.close(fd)


@needs_io_uring
def test_a_registered_region_moves_the_same_bytes(tmp_path: Path):
    path = tmp_path / "data"
    path.write_bytes(bytes(64 * BLOCK_BYTES))
    fd = os.open(path, os.O_RDWR)
    use_direct(fd)
    io = UringIo(fd)
    region = filled(32 * BLOCK_BYTES, 1)
    io.register_region(region)
    inside = [region[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES] for i in range(32)]
    io.submit([Op(i, True, i * BLOCK_BYTES, inside[i]) for i in range(32)])
    collect(io, 32)
    before = bytes(region)
    assert path.read_bytes()[: len(before)] == before
    io.submit([Op(i, False, (31 - i) * BLOCK_BYTES, inside[i]) for i in range(32)])
    collect(io, 32)
    assert b"".join(reversed(inside)) == before
    with pytest.raises(ValueError, match="registered already"):
        io.register_region(region)
    with pytest.raises(BufferError):
        region.release()  # the kernel would go on moving what is no longer there
    io.close()
    region.release()
    os.close(fd)


@needs_io_uring
def test_an_op_called_back_leaves_its_buffer_alone(pipe: Pipe):
    io = UringIo(pipe.out, depth=2)
    buffers = [bytearray(BLOCK_BYTES) for _ in range(4)]
    io.submit(reads(*buffers))
    for token in (0, 3, 3, 77):
        io.cancel(token)
    gone = collect(io, 2)
    assert {token: c.error.errno for token, c in gone.items()} == {0: errno.ECANCELED, 3: errno.ECANCELED}
    pipe.feed(2)
    assert all(c.error is None for c in collect(io, 2).values())
    assert [any(buffer) for buffer in buffers] == [False, True, True, False]
    io.close()


@needs_io_uring
def test_an_op_past_its_deadline_is_a_timeout_and_leaves_its_buffer_alone(pipe: Pipe):
    io = UringIo(pipe.out, depth=1, deadline_s=0.01)
    buffers = [bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)]
    io.submit(reads(*buffers))
    found = collect(io, 2)
    assert all(isinstance(c.error, TimeoutError) and c.checksum is None for c in found.values())
    assert all(c.seconds >= 0.01 for c in found.values())
    pipe.feed(2)
    assert io.poll(0.001) == []
    assert not any(map(any, buffers))
    io.submit(reads(*buffers))
    assert {c.error for c in collect(io, 2).values()} == {None}
    io.close()


@needs_io_uring
def test_close_waits_until_the_buffers_are_filled(pipe: Pipe):
    io = UringIo(pipe.out, depth=1)
    buffers = [bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)]
    io.submit(reads(*buffers))
    feeder = threading.Thread(target=pipe.feed, args=(2,))
    feeder.start()
    io.close()
    assert all(map(all, buffers))
    assert io.num_in_flight == 0
    feeder.join()


@needs_io_uring
def test_close_calls_back_what_is_past_its_deadline(pipe: Pipe):
    io = UringIo(pipe.out, depth=1, deadline_s=0.01)
    buffers = [bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)]
    io.submit(reads(*buffers))
    io.close()
    for buffer in buffers:
        buffer.append(0)  # BufferError while anybody holds it


@needs_io_uring
def test_a_buffer_is_held_until_its_completion_is_polled(pipe: Pipe):
    io = UringIo(pipe.out)
    buffer = bytearray(BLOCK_BYTES)
    ops = reads(buffer)
    io.submit(ops)
    with pytest.raises(BufferError):
        ops[0].buffer.release()
    del ops
    gc.collect()
    with pytest.raises(BufferError):
        buffer.append(0)
    pipe.feed()
    assert collect(io, 1)[0].error is None
    buffer.append(0)
    io.close()


@needs_io_uring
def test_an_engine_that_nobody_closed_lets_go_of_its_buffers(pipe: Pipe):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    io = UringIo(pipe.out)
    buffer = bytearray(BLOCK_BYTES)
    io.submit(reads(buffer))
    pipe.feed()
    del io
    gc.collect()
    assert all(buffer)
    buffer.append(0)
    assert len(os.listdir("/proc/self/fd")) == before


@needs_io_uring
def test_a_signal_is_served_while_a_poll_waits_and_loses_no_completion(pipe: Pipe):
    class Served(Exception):
        pass

    def serve(number: int, frame: object) -> None:
        raise Served

    io = UringIo(pipe.out)
    io.submit(reads(bytearray(BLOCK_BYTES)))
    before = signal.signal(signal.SIGALRM, serve)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(Served):
            io.poll(LONG_S)
    finally:
        signal.signal(signal.SIGALRM, before)
    pipe.feed()
    assert collect(io, 1)[0].error is None
    io.close()


@needs_io_uring
def test_other_threads_run_while_a_poll_waits_but_may_not_enter(pipe: Pipe):
    io = UringIo(pipe.out)
    found: list[object] = []

    def intrude() -> None:
        while not found:
            try:
                io.poll()  # before the main thread's poll has begun, it is allowed
                time.sleep(0.002)  # not inside a poll, so that the main thread's can begin
            except RuntimeError as error:
                found.append(error)
        io.wake()

    thread = threading.Thread(target=intrude)
    thread.start()
    while not found:
        try:
            io.poll(LONG_S)
        except RuntimeError:
            continue  # the intruder was in
    thread.join()
    assert "under way" in str(found[0])
    io.close()


@needs_io_uring
@pytest.mark.parametrize(
    ("op", "error"),
    [
        (Op(1 << 70, False, 0, memoryview(bytearray(8))), ValueError),
        (Op(2, False, 1 << 63, memoryview(bytearray(8))), ValueError),
        (Op(2, False, (1 << 63) - 1, memoryview(bytearray(8))), ValueError),
        (Op(2, False, -1, memoryview(bytearray(8))), ValueError),
        (Op(2, False, 0, memoryview(b"")), ValueError),
        (Op(1, False, 0, memoryview(bytearray(8))), ValueError),  # a token twice
        (SimpleNamespace(token="a", is_write=True, offset_bytes=0, buffer=b"x"), TypeError),
        (SimpleNamespace(token=2, is_write=True, offset_bytes=0, buffer=None), TypeError),
        (SimpleNamespace(token=2, is_write=True, offset_bytes=0), AttributeError),
        (None, AttributeError),
    ],
)
def test_garbage_among_ops_is_refused_and_none_is_started(pipe: Pipe, op: Op, error: type[Exception]):
    io = UringIo(pipe.out)
    buffer = bytearray(8)
    with pytest.raises(error):
        io.submit([Op(1, False, 0, memoryview(buffer)), op])
    assert io.num_in_flight == 0
    buffer.append(0)
    assert io.poll() == []
    io.close()


@needs_io_uring
def test_garbage_among_arguments_is_refused(pipe: Pipe):
    for fd, depth in ((1 << 20, 8), (pipe.out, 0), (pipe.out, 1 << 20)):
        with pytest.raises(OSError):  # noqa: PT011 (which one is the kernel's affair)
            UringIo(fd, depth)
    with pytest.raises(TypeError):
        UringIo(pipe.out, -1)
    io = UringIo(pipe.out)
    for garbage in (5, None):
        with pytest.raises(TypeError):
            io.submit(garbage)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        io.poll("soon")  # type: ignore[arg-type]
    assert io.poll(-1.0) == io.poll(float("nan")) == io.poll(-float("inf")) == []
    io.wake()
    assert io.poll(float("inf")) == []
    with pytest.raises(BufferError):
        io.register_region(memoryview(b"read-only"))
    io.close()


def test_without_the_native_module_opening_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "impala_vllm._native", None)
    monkeypatch.delattr("impala_vllm._native", raising=False)
    with (tmp_path / "data").open("w+b") as file, pytest.raises(OSError, match="native module") as caught:
        UringIo(file.fileno())
    assert caught.value.errno == errno.ENOSYS

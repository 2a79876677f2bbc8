"""What every block I/O engine must do. A test module subclasses `BlockIoContract` and says how to make one."""

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from impala_vllm.transfer.alignment import aligned_buffer, use_direct
from impala_vllm.transfer.block_io import BlockIo, Completion, Op

FILE_BYTES = 16 << 20
BLOCK_BYTES = 4096
LONG_S = 600.0
"""Longer than any test may take: a poll that waits this long has failed."""


def collect(io: BlockIo, num_ops: int) -> dict[int, Completion]:
    """Wait for that many completions, by token."""
    found: dict[int, Completion] = {}
    while len(found) < num_ops:
        for completion in io.poll(LONG_S):
            assert completion.token not in found
            found[completion.token] = completion
    return found


def filled(num_bytes: int, seed: int) -> memoryview:
    """An aligned buffer of reproducible noise."""
    buffer = aligned_buffer(num_bytes)
    buffer[:] = random.Random(seed).randbytes(num_bytes)
    return buffer


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
class BlockIoContract:
    """The suite; every test runs on a buffered and a direct file."""

    def make(self, fd: int) -> BlockIo:
        """An engine on an open file."""
        raise NotImplementedError

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "data"
        path.write_bytes(bytes(FILE_BYTES))
        return path

    @pytest.fixture
    def io(self, path: Path, direct: bool) -> Iterator[BlockIo]:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if direct and not use_direct(fd):
            os.close(fd)
            pytest.skip("the file system has no direct I/O")
        io = self.make(fd)
        os.close(fd)  # the engine keeps a duplicate
        yield io
        io.close()

    @pytest.mark.parametrize("num_ops", [1, 63, 1000])
    def test_what_was_written_is_read_back(self, io: BlockIo, num_ops: int):
        buffers = [filled(BLOCK_BYTES, seed) for seed in range(num_ops)]
        io.submit([Op(i, True, i * BLOCK_BYTES, buffer) for i, buffer in enumerate(buffers)])
        assert all(c.error is None for c in collect(io, num_ops).values())
        received = [aligned_buffer(BLOCK_BYTES) for _ in range(num_ops)]
        io.submit([Op(i, False, i * BLOCK_BYTES, buffer) for i, buffer in enumerate(received)])
        assert all(c.error is None for c in collect(io, num_ops).values())
        assert received == buffers

    def test_large_and_small_ops_mix(self, io: BlockIo, path: Path):
        sizes = [1, 3, 256, 2, 640, 1]  # blocks
        offsets = [sum(sizes[:i]) * BLOCK_BYTES for i in range(len(sizes))]
        buffers = [filled(size * BLOCK_BYTES, size) for size in sizes]
        io.submit([Op(i, True, offsets[i], buffer) for i, buffer in enumerate(buffers)])
        collect(io, len(sizes))
        data = path.read_bytes()
        assert all(
            data[start : start + buffer.nbytes] == buffer for start, buffer in zip(offsets, buffers, strict=True)
        )

    def test_the_checksum_is_that_of_the_bytes_moved(self, io: BlockIo):
        buffer = filled(3 * BLOCK_BYTES, 1)
        expected = xxh3_64_intdigest(buffer)
        io.submit([Op(1, True, 0, buffer)])
        assert collect(io, 1)[1].checksum == expected
        received = aligned_buffer(3 * BLOCK_BYTES)
        io.submit([Op(2, False, 0, received)])
        assert collect(io, 1)[2].checksum == expected

    def test_only_the_ops_own_bytes_change(self, io: BlockIo, path: Path):
        around = filled(3 * BLOCK_BYTES, 2)
        before = bytes(around)
        io.submit([Op(1, False, 0, around[BLOCK_BYTES : 2 * BLOCK_BYTES])])
        collect(io, 1)
        assert around[:BLOCK_BYTES] == before[:BLOCK_BYTES]
        assert around[2 * BLOCK_BYTES :] == before[2 * BLOCK_BYTES :]
        io.submit([Op(2, True, BLOCK_BYTES, filled(BLOCK_BYTES, 3))])
        collect(io, 1)
        data = path.read_bytes()
        assert not any(data[:BLOCK_BYTES])
        assert not any(data[2 * BLOCK_BYTES :])

    @pytest.mark.parametrize("wrong", ["offset", "length", "address"])
    def test_a_misaligned_op_is_refused_and_none_is_started(self, io: BlockIo, path: Path, wrong: str):
        if io.alignment_bytes == 1:
            pytest.skip("this engine takes any alignment")
        room = filled(2 * BLOCK_BYTES, 4)
        offset, buffer = {
            "offset": (1, room[:BLOCK_BYTES]),
            "length": (0, room[: BLOCK_BYTES - 1]),
            "address": (0, room[1 : BLOCK_BYTES + 1]),
        }[wrong]
        with pytest.raises(ValueError, match="op 2"):
            io.submit([Op(1, True, 0, room[:BLOCK_BYTES]), Op(2, True, offset, buffer)])
        assert io.num_in_flight == 0
        io.close()
        assert not any(path.read_bytes())

    def test_buffers_that_cannot_be_filled_are_refused(self, io: BlockIo):
        with pytest.raises(ValueError, match="op 1"):
            io.submit([Op(1, False, 0, filled(BLOCK_BYTES, 5).toreadonly())])
        with pytest.raises(ValueError, match="op 2"):
            io.submit([Op(2, False, 0, filled(2 * BLOCK_BYTES, 5)[::2])])
        with pytest.raises(ValueError, match="op 3"):
            io.submit([Op(3, False, 0, filled(BLOCK_BYTES, 5)[:0])])
        assert io.num_in_flight == 0

    def test_a_token_names_one_op_until_it_was_polled(self, io: BlockIo):
        buffer, other = filled(BLOCK_BYTES, 5), filled(BLOCK_BYTES, 6)
        with pytest.raises(ValueError, match="op 1"):
            io.submit([Op(1, False, 0, buffer), Op(1, False, 0, other)])
        assert io.num_in_flight == 0
        io.submit([Op(token, False, 0, aligned_buffer(BLOCK_BYTES)) for token in range(20)])
        tokens = {completion.token for completion in io.poll(LONG_S)}  # by then others are done, too
        for token in set(range(20)) - tokens:
            with pytest.raises(ValueError, match=f"op {token}:"):
                io.submit([Op(token, False, 0, other)])
        again = min(tokens)
        io.submit([Op(again, False, 0, other)])
        assert collect(io, 20 - len(tokens) + 1).keys() == set(range(20)) - tokens | {again}
        assert io.num_in_flight == 0

    def test_a_read_past_the_end_is_an_error(self, io: BlockIo):
        io.submit(
            [
                Op(1, False, FILE_BYTES - BLOCK_BYTES, aligned_buffer(2 * BLOCK_BYTES)),
                Op(2, False, FILE_BYTES + BLOCK_BYTES, aligned_buffer(BLOCK_BYTES)),
                Op(3, False, FILE_BYTES - BLOCK_BYTES, aligned_buffer(BLOCK_BYTES)),
            ]
        )
        found = collect(io, 3)
        assert isinstance(found[1].error, OSError)
        assert isinstance(found[2].error, OSError)
        assert found[1].checksum is None
        assert found[3].error is None

    def test_what_the_system_refuses_is_in_the_completion(self, path: Path, direct: bool):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if direct and not use_direct(fd):
            os.close(fd)
            pytest.skip("the file system has no direct I/O")
        io = self.make(fd)
        os.close(fd)
        io.submit([Op(1, True, 0, filled(BLOCK_BYTES, 6)), Op(2, False, 0, aligned_buffer(BLOCK_BYTES))])
        found = collect(io, 2)
        io.close()
        assert isinstance(found[1].error, OSError)
        assert found[2].error is None

    def test_in_flight_is_what_was_submitted_and_not_polled(self, io: BlockIo):
        assert io.poll() == []
        io.submit([])
        io.submit([Op(i, True, i * BLOCK_BYTES, filled(BLOCK_BYTES, i)) for i in range(5)])
        assert io.num_in_flight == 5
        num_polled = 0
        while num_polled < 5:
            num_polled += len(io.poll(LONG_S))
            assert io.num_in_flight == 5 - num_polled

    def test_a_wake_ends_a_poll(self, io: BlockIo):
        is_ready = threading.Event()

        def wake() -> None:
            is_ready.wait()
            io.wake()

        waker = threading.Thread(target=wake)
        waker.start()
        is_ready.set()
        assert io.poll(LONG_S) == []
        waker.join()

    def test_a_wake_without_a_poll_ends_the_next_one(self, io: BlockIo):
        io.wake()
        assert io.poll(LONG_S) == []

    def test_a_wake_loses_no_completion(self, io: BlockIo):
        io.submit([Op(i, True, i * BLOCK_BYTES, filled(BLOCK_BYTES, i)) for i in range(50)])
        found: set[int] = set()
        while len(found) < 50:
            io.wake()
            found |= {completion.token for completion in io.poll(LONG_S)}
        assert io.num_in_flight == 0

    def test_close_waits_for_what_is_in_flight(self, io: BlockIo, path: Path):
        buffers = [filled(16 * BLOCK_BYTES, seed) for seed in range(63)]
        io.submit([Op(i, True, i * 16 * BLOCK_BYTES, buffer) for i, buffer in enumerate(buffers)])
        io.close()
        data = path.read_bytes()
        assert data[: 63 * 16 * BLOCK_BYTES] == b"".join(buffers)

    def test_a_closed_engine_takes_nothing_and_closes_again(self, io: BlockIo):
        io.close()
        io.close()
        io.wake()
        with pytest.raises(ValueError, match="closed"):
            io.submit([Op(1, True, 0, filled(BLOCK_BYTES, 1))])
        with pytest.raises(ValueError, match="closed"):
            io.poll()

    def test_closing_lets_go_of_the_file(self, path: Path, direct: bool):
        before = len(os.listdir("/proc/self/fd"))
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if direct:
            use_direct(fd)
        self.make(fd).close()
        os.close(fd)
        assert len(os.listdir("/proc/self/fd")) == before

    def test_a_buffer_is_free_once_its_completion_was_polled(self, io: BlockIo):
        if io.alignment_bytes > 1:
            pytest.skip("memory that tells whether it is held cannot be aligned")
        memory = bytearray(BLOCK_BYTES)
        io.submit([Op(1, False, 0, memoryview(memory))])
        collect(io, 1)
        io.submit([Op(2, False, 0, filled(BLOCK_BYTES, 1))])
        collect(io, 1)
        memory.append(0)  # BufferError while anybody holds a view of it

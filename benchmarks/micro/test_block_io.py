"""A batch of 64 blocks of 64 KiB through each engine: to the disk or back, with checksums, as the NVMe tier does it.

Bar: io_uring at least 1.3 times as fast as the thread pool. `python -m benchmarks.io` has the steady state and fio.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from impala_vllm.transfer.alignment import aligned_buffer, use_direct
from impala_vllm.transfer.block_io import BlockIo, Op
from impala_vllm.transfer.thread_pool_io import ThreadPoolIo
from impala_vllm.transfer.uring_io import UringIo

BLOCK_BYTES = 64 << 10
NUM_BLOCKS = 64
NUM_ROUNDS = 50

ENGINES: dict[str, Callable[[int], BlockIo]] = {
    "threads": lambda fd: ThreadPoolIo(fd, num_threads=8),
    "uring": lambda fd: UringIo(fd),
}


@pytest.fixture(params=list(ENGINES))
def io(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlockIo]:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(NUM_BLOCKS * BLOCK_BYTES))
    fd = os.open(path, os.O_RDWR)
    try:
        if not use_direct(fd):
            pytest.skip("the file system has no direct I/O")
        try:
            io = ENGINES[request.param](fd)
        except OSError as error:
            pytest.skip(str(error))
    finally:
        os.close(fd)
    yield io
    io.close()


@pytest.mark.parametrize("is_write", [False, True], ids=["read", "write"])
def test_a_batch(benchmark, io: BlockIo, is_write: bool):
    region = aligned_buffer(NUM_BLOCKS * BLOCK_BYTES)
    ops = [Op(i, is_write, i * BLOCK_BYTES, region[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES]) for i in range(NUM_BLOCKS)]

    def move() -> int:
        io.submit(ops)
        num_done = 0
        while io.num_in_flight:
            num_done += sum(completion.error is None for completion in io.poll(1.0))
        return num_done

    assert benchmark.pedantic(move, rounds=NUM_ROUNDS, warmup_rounds=2) == NUM_BLOCKS

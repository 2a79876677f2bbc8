"""One load on one file: random blocks, so many at once, for so long. What moved, and what CPU time it took."""

import itertools
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from impala_vllm.transfer.alignment import aligned_buffer, use_direct
from impala_vllm.transfer.block_io import BlockIo, Op
from impala_vllm.transfer.limits import Limits
from impala_vllm.transfer.thread_pool_io import ThreadPoolIo
from impala_vllm.transfer.uring_io import UringIo

NUM_DRAWN = 1 << 16
AHEAD = Limits().max_in_flight - Limits().depth
"""So many more than a load's `depth` our engines have, waiting in them as in the NVMe tier's."""


@dataclass(frozen=True, slots=True)
class Load:
    """Reads or writes of one size at random multiples of it."""

    is_write: bool
    block_bytes: int
    depth: int
    """Ops at the disk at once: each that is done is followed by another."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Rate:
    """What a load achieved."""

    bytes_per_s: float
    cpu_s_per_gb: float
    """User and system time of all threads over 10^9 bytes."""


def make_file(path: Path, num_bytes: int) -> None:
    """Random bytes on the disk: no holes, nothing that a device could skip or compress."""
    with path.open("wb") as out:
        for _ in range(num_bytes >> 20):
            out.write(os.urandom(1 << 20))
        os.fsync(out.fileno())


def run_threads(path: Path, load: Load, num_threads: int) -> Rate:
    """By `ThreadPoolIo`."""
    fd = _open(path)
    return _drive(ThreadPoolIo(fd, num_threads), fd, load)


def run_uring(path: Path, load: Load, is_registered: bool) -> Rate:
    """By `UringIo`, its buffers pinned once or with each op."""
    fd = _open(path)
    return _drive(UringIo(fd, load.depth), fd, load, is_registered)


def run_fio(path: Path, load: Load, is_registered: bool = False) -> Rate:
    """By fio's io_uring engine with its defaults, or with file and buffers registered as ours are.

    Raises OSError or CalledProcessError where it does not run.
    """
    command = [
        "fio", "--name=load", f"--filename={path}", f"--size={path.stat().st_size}", "--allow_file_create=0",
        "--ioengine=io_uring", "--direct=1", f"--rw={'randwrite' if load.is_write else 'randread'}",
        f"--bs={load.block_bytes}", f"--iodepth={load.depth}", "--norandommap", "--randrepeat=0", "--time_based",
        f"--runtime={load.seconds * 1000:.0f}ms", "--output-format=json",
        *(("--registerfiles=1", "--fixedbufs=1") if is_registered else ()),
    ]  # fmt: skip
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    job = json.loads(out)["jobs"][0]
    side = job["write" if load.is_write else "read"]
    seconds = side["runtime"] / 1000
    cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
    return Rate(side["io_bytes"] / seconds, cpu_s / (side["io_bytes"] / 1e9))


def _open(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    if not use_direct(fd):
        os.close(fd)
        raise OSError(f"{path}: this file system has no direct I/O")
    return fd


def _drive(io: BlockIo, fd: int, load: Load, is_registered: bool = False) -> Rate:
    num_blocks = os.fstat(fd).st_size // load.block_bytes
    os.close(fd)
    rng = Random()
    # Drawn beforehand: whoever has blocks to move knows where they lie.
    offsets = itertools.cycle([rng.randrange(num_blocks) * load.block_bytes for _ in range(NUM_DRAWN)])
    num_ops = load.depth + AHEAD
    region = aligned_buffer(num_ops * load.block_bytes)
    region[:] = os.urandom(region.nbytes)
    buffers = [region[i * load.block_bytes : (i + 1) * load.block_bytes] for i in range(num_ops)]
    if is_registered:
        assert isinstance(io, UringIo)
        io.register_region(region)

    def ops(tokens: list[int]) -> list[Op]:
        return [Op(t, load.is_write, next(offsets), buffers[t]) for t in tokens]

    start, start_cpu, num_done = time.perf_counter(), time.process_time(), 0
    io.submit(ops(list(range(num_ops))))
    while io.num_in_flight:
        done = io.poll(1.0)
        for completion in done:
            if completion.error is not None:
                raise completion.error
        num_done += len(done)
        if time.perf_counter() - start < load.seconds:
            io.submit(ops([completion.token for completion in done]))
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    io.close()
    num_bytes = num_done * load.block_bytes
    return Rate(num_bytes / seconds, cpu_s / (num_bytes / 1e9))

"""Batched, aligned I/O on one file: the interface that the NVMe slab stands on.

An engine moves whole buffers at given offsets and can take their checksum on the way. It is owned by one thread: none
of its methods may be called by two at once. Which engine is at hand is decided by `open_block_io`.
"""

import errno
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from impala_vllm.transfer.uring_io import UringIo

logger = logging.getLogger("vllm.impala")

PROOF_S = 1.0
"""Between looks for the first block; a disk that does not answer has stopped us before, when the slab was opened."""


@dataclass(frozen=True, slots=True)
class Op:
    """One buffer to move. Address, offset and length are multiples of the engine's `alignment_bytes`."""

    token: int
    """The caller's name for it, unique among those in flight."""
    is_write: bool
    offset_bytes: int
    buffer: memoryview
    """Contiguous bytes, writable for a read. The engine's until its completion is polled."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of an op."""

    token: int
    error: OSError | None
    """None: every byte was moved. A short read or write is an error too."""
    checksum: int | None
    """XXH3, 64 bit, of the buffer as moved; None with an error."""
    seconds: float
    """From submit to done."""


class BlockIo(Protocol):
    """The contract; `tests/contracts/block_io.py` is the suite every engine passes."""

    alignment_bytes: int
    name: str
    """What does the work, in a word or two, for people."""

    @property
    def num_in_flight(self) -> int:
        """Ops submitted and not polled yet."""
        ...

    def submit(self, ops: Sequence[Op]) -> None:
        """Start the ops, in any order. Never waits for the disk.

        Raises ValueError, starting none, on a misaligned op, a buffer that is empty or has gaps, one to read into that
        is read-only, a token in flight already, and on a closed engine.
        """
        ...

    def poll(self, timeout_s: float = 0.0) -> list[Completion]:
        """Completions that were not polled yet, a few where there are many; waits for the first one up to `timeout_s`,
        or until `wake` is called.

        Raises ValueError on a closed engine.
        """
        ...

    def wake(self) -> None:
        """End a `poll` that waits, or the next one that would. The only method that another thread may call.

        Does nothing on a closed engine.
        """
        ...

    def close(self) -> None:
        """Wait for what is in flight, then let go of the file; completions not polled by then are lost. Idempotent."""
        ...


def open_block_io(
    fd: int, depth: int = 16, deadline_s: float | None = None, region: memoryview | None = None
) -> BlockIo:
    """The best engine at hand for an open file: io_uring where file, kernel and installation allow it, proven by a
    read, else threads.

    It moves data past the page cache where the descriptor does (`alignment.use_direct`), and keeps a duplicate of the
    descriptor. More ops than `depth` wait inside it. Where the engine can, an op in flight for `deadline_s` is
    called back, and `region`, in which most buffers lie, is pinned until the engine is closed.
    """
    # The engines import this module for the words it defines.
    from impala_vllm.transfer.alignment import is_direct
    from impala_vllm.transfer.thread_pool_io import ThreadPoolIo
    from impala_vllm.transfer.uring_io import UringIo

    if is_direct(fd):  # through the page cache io_uring moves data on kernel threads: no better than ours
        try:
            io = _proven(UringIo(fd, depth, deadline_s), os.fstat(fd).st_size)
        except (OSError, AttributeError) as error:  # AttributeError: the native module is of an earlier build
            logger.info("no io_uring for the NVMe tier, threads do its I/O: %s", error)
        else:
            if region is not None:
                _register(io, region)
            return io
    return ThreadPoolIo(fd, num_threads=min(8, depth))


def _proven(io: "UringIo", file_bytes: int) -> "UringIo":
    """`io`, which has read the file's first block. Raises OSError, the engine closed, where it cannot.

    A container's rules may allow a ring to be made and registered and refuse every op on it, or never answer one: that
    is found out on a pipe, as an engine waits for what the disk was asked for.
    """
    from impala_vllm import native
    from impala_vllm.transfer.alignment import aligned_buffer

    try:
        if not native.can_use_io_uring():
            raise OSError(errno.ENOSYS, "a ring is made, and nothing that it is asked for is done")
        if file_bytes < io.alignment_bytes:
            return io  # nothing to read
        io.submit([Op(0, False, 0, aligned_buffer(io.alignment_bytes))])
        done: list[Completion] = []
        while not done:
            done = io.poll(PROOF_S)
        if done[0].error is not None:
            raise done[0].error
    except (OSError, AttributeError):
        io.close()
        raise
    return io


def _register(io: "UringIo", region: memoryview) -> None:
    try:
        io.register_region(region)
    except OSError as error:  # a container's `ulimit -l`, mostly; ops are pinned one by one then
        logger.info("the host tier's memory is not registered with io_uring: %s", error)

"""Block I/O through io_uring: the engine for direct files where the kernel offers one.

Translation between `BlockIo` and the native `UringFile`, which does the work; a whole batch costs one system call.
"""

from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from impala_vllm import native
from impala_vllm.transfer.alignment import DIRECT_ALIGNMENT_BYTES, is_direct
from impala_vllm.transfer.block_io import Completion, Op


class UringIo:
    """`BlockIo` on an open file. It starts no thread; the descriptor is duplicated and the caller may close its own.

    Raises OSError where the native module or io_uring is missing or forbidden: take `ThreadPoolIo` then.
    An op in flight for `deadline_s` is called back. Its completion is an error (ETIMEDOUT) whatever became of it, and
    comes once the kernel no longer touches the buffer: at once if the op had not begun, else when the disk answers.
    Ops are only called back inside `poll` and `close`.
    """

    def __init__(self, fd: int, depth: int = 64, deadline_s: float | None = None) -> None:
        """At most `depth` ops are with the kernel at a time, the others wait their turn."""
        self.name = "io_uring"
        self.is_direct = is_direct(fd)
        self.alignment_bytes = DIRECT_ALIGNMENT_BYTES if self.is_direct else 1
        self._file = native.open_uring_file(fd, depth, self.alignment_bytes, deadline_s)
        self._unsummed: dict[int, memoryview] | None = None if native.has_checksum() else {}

    @property
    def num_in_flight(self) -> int:
        return self._file.num_in_flight

    def register_region(self, region: memoryview) -> None:
        """Pin the memory that most buffers lie in; ops inside it cost less. Once, and kept until `close`.

        Raises OSError where the kernel will not pin it (ENOMEM: above `ulimit -l`); everything works without.
        """
        self._file.register_region(region)
        self.name = "io_uring, registered memory"

    def submit(self, ops: Sequence[Op]) -> None:
        self._file.submit(ops)
        if self._unsummed is not None:
            self._unsummed.update((op.token, op.buffer) for op in ops)

    def poll(self, timeout_s: float = 0.0) -> list[Completion]:
        return [self._completion(*done) for done in self._file.poll(timeout_s)]

    def cancel(self, token: int) -> None:
        """Call an op back: it completes with ECANCELED if it had not begun, else with what became of it."""
        self._file.cancel(token)

    def wake(self) -> None:
        self._file.wake()

    def close(self) -> None:
        self._file.close()
        if self._unsummed is not None:
            self._unsummed.clear()

    def _completion(self, token: int, error: int, message: str, checksum: int | None, seconds: float) -> Completion:
        if self._unsummed is not None:
            buffer = self._unsummed.pop(token)
            checksum = None if error else xxh3_64_intdigest(buffer)
        return Completion(token, OSError(error, message) if error else None, checksum, seconds)

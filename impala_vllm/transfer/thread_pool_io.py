"""Block I/O with plain system calls on worker threads: the engine that works everywhere.

One call moves one buffer; system calls and checksums release the GIL, so that threads overlap.
"""

import errno
import os
import threading
import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue

from xxhash import xxh3_64_intdigest

from impala_vllm.transfer.alignment import DIRECT_ALIGNMENT_BYTES, check_ops, is_direct
from impala_vllm.transfer.block_io import Completion, Op


class ThreadPoolIo:
    """`BlockIo` on an open file, direct where the descriptor is (see `alignment.use_direct`).

    Threads: `impala-block-io-N`, daemons that take ops from `_todo` and put completions on `_done`, owned by whoever
    made this object. The descriptor is duplicated: the caller may close its own, and a lock on the open file stays
    until the last op is done.
    """

    def __init__(self, fd: int, num_threads: int = 8) -> None:
        self._fd = os.dup(fd)
        self.is_direct = is_direct(self._fd)
        self.alignment_bytes = DIRECT_ALIGNMENT_BYTES if self.is_direct else 1
        self.name = f"{num_threads} threads"
        self._tokens: set[int] = set()  # submitted and not polled
        self._is_closed = False
        self._todo: SimpleQueue[tuple[Op, float] | None] = SimpleQueue()
        self._done: SimpleQueue[Completion | None] = SimpleQueue()  # None: a wake-up
        self._threads = [
            threading.Thread(target=self._work, name=f"impala-block-io-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_in_flight(self) -> int:
        return len(self._tokens)

    def submit(self, ops: Sequence[Op]) -> None:
        self._check_open()
        check_ops(ops, self.alignment_bytes, self._tokens)
        now = time.monotonic()
        self._tokens.update(op.token for op in ops)
        for op in ops:
            self._todo.put((op, now))

    def poll(self, timeout_s: float = 0.0) -> list[Completion]:
        self._check_open()
        try:
            found = [self._done.get(timeout=timeout_s) if timeout_s > 0.0 else self._done.get_nowait()]
        except Empty:
            return []
        # No more than are there now: whoever wakes all the time must not keep us here.
        found += [self._done.get_nowait() for _ in range(self._done.qsize())]
        done = [completion for completion in found if completion is not None]
        self._tokens.difference_update(completion.token for completion in done)
        return done

    def wake(self) -> None:
        self._done.put(None)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()
        os.close(self._fd)
        self._tokens.clear()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("the block I/O engine is closed")

    def _work(self) -> None:
        while (task := self._todo.get()) is not None:
            self._done.put(_run(self._fd, *task))
            del task  # an idle worker must not hold the caller's buffer


def _run(fd: int, op: Op, submitted_s: float) -> Completion:
    """Do one op; whatever goes wrong is in its completion, or its owner would wait for ever."""
    error, checksum = None, None
    try:
        checksum = _move(fd, op)
    except OSError as caught:
        error = caught
    except Exception as caught:
        error = OSError(errno.EIO, f"{type(caught).__name__}: {caught}")
    return Completion(op.token, error, checksum, time.monotonic() - submitted_s)


def _move(fd: int, op: Op) -> int:
    """Read or write the whole buffer and return its checksum."""
    if op.is_write:
        checksum = xxh3_64_intdigest(op.buffer)
        num_bytes = os.pwritev(fd, [op.buffer], op.offset_bytes)
    else:
        num_bytes = os.preadv(fd, [op.buffer], op.offset_bytes)
        checksum = xxh3_64_intdigest(op.buffer)
    if num_bytes != op.buffer.nbytes:
        verb = "write" if op.is_write else "read"
        raise OSError(errno.EIO, f"short {verb}: {num_bytes} of {op.buffer.nbytes} bytes at {op.offset_bytes}")
    return checksum

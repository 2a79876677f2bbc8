"""A clock that tests advance, and a disk that takes virtual time: real bytes on a real file, no threads, no waiting."""

import errno
import heapq
import math
import os
from collections.abc import Callable, Sequence

from xxhash import xxh3_64_intdigest

from impala_vllm.transfer.block_io import Completion, Op


class ManualClock:
    """Seconds that pass when a test says so."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class VirtualDisk:
    """`BlockIo` in virtual time: an op takes `seconds(op)`, `math.inf` for ever, and moves its bytes at the end of it.

    `poll` advances the clock to the next completion or by its time-out. `fails(op)` makes an op an error.
    """

    alignment_bytes = 1
    name = "virtual"

    def __init__(self, fd: int, clock: ManualClock) -> None:
        self.seconds: Callable[[Op], float] = lambda op: 0.001
        self.fails: Callable[[Op], bool] = lambda op: False
        self.started: list[tuple[float, Op]] = []
        """Every op and when it was submitted."""
        self.most_in_flight = 0
        self.most_writes_in_flight = 0
        self._fd = os.dup(fd)
        self._clock = clock
        self._in_flight: list[tuple[float, int, Op, float]] = []
        self._is_closed = False

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def submit(self, ops: Sequence[Op]) -> None:
        for op in ops:
            beside = [other for _, _, other, _ in self._in_flight if other.offset_bytes == op.offset_bytes]
            assert not any(op.is_write or other.is_write for other in beside), "a writer is not alone"
            self.started.append((self._clock.now, op))
            entry = (self._clock.now + self.seconds(op), len(self.started), op, self._clock.now)
            heapq.heappush(self._in_flight, entry)
        self.most_in_flight = max(self.most_in_flight, len(self._in_flight))
        self.most_writes_in_flight = max(self.most_writes_in_flight, sum(e[2].is_write for e in self._in_flight))

    def poll(self, timeout_s: float = 0.0) -> list[Completion]:
        due_s = self._in_flight[0][0] if self._in_flight else math.inf
        self._clock.now = max(self._clock.now, min(due_s, self._clock.now + timeout_s))
        done: list[Completion] = []
        while self._in_flight and self._in_flight[0][0] <= self._clock.now:
            _, _, op, started_s = heapq.heappop(self._in_flight)
            error = self._move(op)
            checksum = xxh3_64_intdigest(op.buffer) if error is None else None
            done.append(Completion(op.token, error, checksum, self._clock.now - started_s))
        return done

    def wake(self) -> None:
        pass

    def close(self) -> None:
        """What is in flight is done at once, what takes for ever is not."""
        if not self._is_closed:
            self._is_closed = True
            for due_s, _, op, _ in self._in_flight:
                if due_s < math.inf:
                    self._move(op)
            self._in_flight.clear()
            os.close(self._fd)

    def crash(self) -> None:
        """The process dies: of each write in flight, half its bytes reach the disk."""
        for _, _, op, _ in self._in_flight:
            if op.is_write:
                os.pwritev(self._fd, [op.buffer[: op.buffer.nbytes // 2]], op.offset_bytes)
        self._in_flight.clear()
        self.close()

    def _move(self, op: Op) -> OSError | None:
        if self.fails(op):
            return OSError(errno.EIO, "the virtual disk fails")
        move = os.pwritev if op.is_write else os.preadv
        num_bytes = move(self._fd, [op.buffer], op.offset_bytes)
        return None if num_bytes == op.buffer.nbytes else OSError(errno.EIO, "short")

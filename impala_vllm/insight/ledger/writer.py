"""The file side of the ledger: a thread takes records from a bounded queue and appends them.

Owner: the engine loop's thread calls `put` and `close`; the thread `impala-ledger` alone touches files. `put` never
waits: what does not fit is refused and counted. Trouble with the disk is counted, logged once and tried again; what
could not be written meanwhile is lost. Finished traces are appended to FILE, rotated to FILE.1, FILE.2...; live
ones are in FILE.live, replaced as a whole, and move into FILE when the next server starts.
"""

import fcntl
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from impala_vllm.insight.ledger.record import Header, Record, Unlinked

logger = logging.getLogger("vllm.impala")

MAX_QUEUED = 4096
"""Records: as many as there are traces. Some 10 MB."""
POLL_S = 0.5
LIVE_S, LIVE_BYTES_PER_S = 1.0, 200e3
"""FILE.live is as old as that at least before it is replaced, and older the larger it is: 2,000 traces, some 5 s. So
much of traces that go on is lost in a crash."""
LONGEST_PAUSE_S = 60.0
"""Between two attempts while the disk refuses."""
LOG_BYTES_PER_S, LOG_BYTES_AT_ONCE = 300.0, float(4 << 20)
"""Rows of turns may take 26 MB a day, beside which 100,000 bare records with every field stay below 100 MB."""
PRIVATE = 0o600

_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Counts:
    """Since the start. Written by the writer's thread, but for `refused`."""

    records: int = 0
    """Finished traces written."""
    bytes: int = 0
    refused: int = 0
    """Records that found the queue full."""
    lost: int = 0
    """Records that could not be written."""
    errors: int = 0
    """Attempts to write that failed."""
    bare: int = 0
    """Records written without their rows: the byte budget was spent."""
    trouble: str | None = None
    """What the disk says, while it refuses."""


class Writer:
    """Starts its thread at once; `close` drains it. One process a FILE: a second one is refused by a lock."""

    def __init__(
        self,
        path: Path,
        header: Header,
        max_bytes: int,
        keep: int,
        on_final: Callable[[Record], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """FILE is rotated at `max_bytes`, `keep` older ones stay. The thread tells `on_final` of finished traces."""
        self.counts = Counts()
        self._path, self._header = path, header
        self._max_bytes, self._keep = max_bytes, keep
        self._on_final = on_final
        self._clock = clock
        self._queue: deque[Record | Unlinked] = deque()
        self._live: dict[str, bytes] = {}
        self._is_live_changed = False
        self._live_s = self._budget_s = self._clock()
        """`_live_s`: when FILE.live may be replaced next."""
        self._budget_bytes = LOG_BYTES_AT_ONCE
        self._file: IO[bytes] | None = None
        self._size = 0
        self._pause_s, self._again_s = 0.0, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="impala-ledger", daemon=True)
        self._thread.start()

    @property
    def live_path(self) -> Path:
        """Where the records of live traces are."""
        return self._path.with_name(self._path.name + ".live")

    def put(self, record: Record | Unlinked) -> bool:
        """Leave a record for the thread. False: the queue is full. Microseconds."""
        if len(self._queue) >= MAX_QUEUED:
            self.counts.refused += 1
            return False
        self._queue.append(record)
        return True

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is queued and end the thread; give up on a disk that takes longer. Idempotent."""
        self._stop.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stop.wait(POLL_S)
            try:
                self._drain(is_last)
            except OSError as e:
                self._refused(e)
            except Exception as e:  # whatever it is, the engine must not hear of it
                self._refused(OSError(0, type(e).__name__))
                logger.exception("impala: the ledger's writer failed on a record")
        self._close_file()

    def _drain(self, is_last: bool) -> None:
        """Write what is queued. Raises OSError; what was taken is lost then, and counted."""
        now = self._clock()
        lines: list[bytes] = []
        num_final = 0
        while self._queue:
            record = self._queue.popleft()
            name = record.trace if isinstance(record, Record) else f"{record.run}/"
            line = self._line(record, now)
            if isinstance(record, Record) and not record.live:
                self._live.pop(name, None)
                lines.append(line)
                num_final += 1
                self._tell(record)
            else:
                self._live[name] = line
            self._is_live_changed = True
        if self.counts.trouble is not None and now < self._again_s and not is_last:
            self.counts.lost += num_final
            return
        try:
            file = self._open()
            if lines:
                self._append(file, lines)
        except OSError:
            self.counts.lost += num_final
            raise
        self.counts.records += num_final
        if self._is_live_changed and (is_last or now >= self._live_s):
            size = self._write_live()
            self._live_s, self._is_live_changed = now + max(LIVE_S, size / LIVE_BYTES_PER_S), False
        if self.counts.trouble is not None:
            logger.warning("impala: the ledger is written again: %s", self._path)
            self.counts.trouble, self._pause_s = None, 0.0

    def _tell(self, record: Record) -> None:
        if self._on_final is None:
            return
        try:
            self._on_final(record)
        except Exception:
            self._on_final = None
            logger.exception("impala: spans failed and are switched off, the ledger goes on")

    def _line(self, record: Record | Unlinked, now: float) -> bytes:
        line = _encode(record) + b"\n"
        if not isinstance(record, Record) or not record.log or record.live:
            return line  # of live traces there is one line each: they are bounded as they are
        earned = (now - self._budget_s) * LOG_BYTES_PER_S
        self._budget_bytes, self._budget_s = min(LOG_BYTES_AT_ONCE, self._budget_bytes + earned), now
        size = len(_encode(record.log))
        if size > self._budget_bytes:
            self.counts.bare += 1
            return _encode(msgspec.structs.replace(record, log=())) + b"\n"
        self._budget_bytes -= size
        return line

    def _append(self, file: IO[bytes], lines: list[bytes]) -> None:
        for start in range(0, len(lines), 256):
            data = b"".join(lines[start : start + 256])
            if self._size + len(data) > self._max_bytes and self._size > 0:
                self._rotate()
                file = self._open()
            _write(file, data)
            self._size += len(data)
            self.counts.bytes += len(data)

    def _open(self) -> IO[bytes]:
        """FILE, for appending; another one where somebody has taken it away."""
        if self._file is not None:
            if os.path.lexists(self._path) and os.fstat(self._file.fileno()).st_nlink:
                return self._file
            self._close_file()
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, PRIVATE)
        file = os.fdopen(descriptor, "ab", buffering=0)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(descriptor, PRIVATE)
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                _write(file, b"\n")  # the line before was torn by a crash
            _write(file, _encode(self._header) + b"\n")
            self._file, self._size = file, os.fstat(descriptor).st_size
            self._adopt_live(file)
        except OSError:
            self._file = None
            file.close()
            raise
        return file

    def _adopt_live(self, file: IO[bytes]) -> None:
        """What a dead server left of live traces goes into FILE; later records of ours replace FILE.live."""
        try:
            left = self.live_path.read_bytes()
        except FileNotFoundError:
            return
        ours = tuple(f'"{self._header.run}{end}'.encode() for end in ("/", '"'))
        lines = [
            line
            for line in left.splitlines(keepends=True)
            if line.endswith(b"\n") and not any(name in line for name in ours)
        ]
        data = b"".join(lines)
        if data:
            _write(file, data)
            self._size += len(data)
            self.live_path.unlink()

    def _write_live(self) -> int:
        """Replace FILE.live: all of it, or nothing. Its bytes."""
        partial = self.live_path.with_name(self.live_path.name + ".partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, PRIVATE)
        data = b"".join((_encode(self._header), b"\n", *self._live.values()))
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            _write(file, data)
        os.replace(partial, self.live_path)
        return len(data)

    def _rotate(self) -> None:
        """FILE becomes FILE.1, FILE.1 becomes FILE.2; the oldest goes."""
        self._close_file()
        numbered = [self._path.with_name(f"{self._path.name}.{n}") for n in range(1, self._keep + 1)]
        for older, newer in zip(reversed(numbered), [*reversed(numbered[:-1]), self._path], strict=True):
            if newer.exists():
                os.replace(newer, older)
        if not numbered:
            self._path.unlink()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _refused(self, error: OSError) -> None:
        self.counts.errors += 1
        self._close_file()
        if self.counts.trouble is None:
            logger.error(
                "impala: the ledger cannot be written (%s: %s); serving continues, records are lost and counted",
                self._path,
                error.strerror or error,
            )
        self.counts.trouble = error.strerror or type(error).__name__
        self._pause_s = min(LONGEST_PAUSE_S, max(1.0, 2 * self._pause_s))
        self._again_s = self._clock() + self._pause_s


def _write(file: IO[bytes], data: bytes) -> None:
    """All of it: a disk that is filling up takes part of it first."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]

"""A fixed-size file of slots and its index, which survive a restart: what lies where, and whether it is whole.

The slab reads and writes its index; data moves through a `BlockIo` on `fd`. Used by one thread at a time. Nothing is
synced to the device: a killed process loses nothing, and what a power cut tears is found by checksum when it is read.
The files are never mapped into memory, so that one truncated under us is an error and not a SIGBUS.
"""

import contextlib
import errno
import fcntl
import logging
import os
import time
from pathlib import Path

from impala_vllm.transfer.alignment import DIRECT_ALIGNMENT_BYTES, use_direct
from impala_vllm.transfer.slab_directory import NotPrivateError, make_private
from impala_vllm.transfer.slab_header import (
    HEADER_BYTES,
    VOID,
    WEAR_OFFSET_BYTES,
    Layout,
    Wear,
    decode_wear,
    difference,
    encode_header,
    encode_wear,
    namespace_digest,
)
from impala_vllm.transfer.slab_records import EMPTY_RECORD, RECORD_BYTES, Record, Records, record_offset

logger = logging.getLogger("vllm.impala")

PROBE_BYTES = DIRECT_ALIGNMENT_BYTES
"""A block behind the last slot that holds nothing: to find out whether the disk works."""
_OVERHEAD_BYTES = HEADER_BYTES + PROBE_BYTES + 2 * DIRECT_ALIGNMENT_BYTES  # both files rounded up to blocks
_MAX_SLOT_BYTES = 0x7FFFF000  # what Linux moves in one call
_SCAN_RECORDS = 32768
_LOCK_RETRY_S = 0.05

_HINTS = {
    errno.ENOSPC: "free some space, lower the NVMe budget or choose another directory",
    errno.EDQUOT: "raise the disk quota, lower the NVMe budget or choose another directory",
    errno.EFBIG: "lower the NVMe budget: the file system or a limit (ulimit -f) forbids a file of this size",
    errno.EROFS: "the file system is read-only: choose another directory",
    errno.EACCES: "give this user the right to write there, or choose another directory",
    errno.EPERM: "give this user the right to write there, or choose another directory",
    errno.ENOENT: "choose another directory",
    errno.ENOTDIR: "a part of the path is a file: choose another directory",
    errno.EEXIST: "it is not a directory: choose another one",
    errno.ELOOP: "it is a symbolic link: remove it or choose another directory",
    errno.EISDIR: "a directory has the file's name: remove it or choose another directory",
    errno.ENOLCK: "the file system has no locks: choose a local directory",
}


class SlabError(Exception):
    """The slab cannot be opened; one line: what, where, what to do."""


class Slab:
    """Slots on disk. `Slab.open` makes one; `close` lets the next opener in."""

    def __init__(self, fd: int, index_fd: int, path: Path, layout: Layout, is_direct: bool) -> None:
        self.path = path
        self.fd = fd
        """The data file, locked; direct where `is_direct`."""
        self.is_direct = is_direct
        self.slot_bytes = layout.slot_bytes
        self.num_slots = layout.num_slots
        self.recovered: dict[bytes, int] = {}
        """What a restart found: slot by key, what can go first. The caller's from `open` on; not kept up to date."""
        self.dropped: str | None = None
        """Why earlier contents were dropped at open; None: there were none, or they are `recovered`."""
        self.num_torn = 0
        """Records found damaged at open; dropped."""
        self.scan_s = 0.0
        """Time that reading the index took at open."""
        self.wear = Wear()
        self._layout = layout
        self._records = Records(layout.num_slots, layout.seed)
        self._index_fd = index_fd
        self._is_wear_saved = True
        self._is_closed = False

    @classmethod
    def open(
        cls,
        directory: str | Path,
        num_bytes: int,
        slot_bytes: int,
        namespace: str | bytes,
        *,
        name: str = "0",
        direct: bool = True,
        wait_s: float = 10.0,
    ) -> "Slab":
        """Open or make DIRECTORY/impala-NAME.slab and its index; both together take at most `num_bytes`.

        `namespace` is everything that makes data differ that has the same key. Contents of another namespace, size or
        format are dropped. `direct=False` keeps the file buffered, for buffers or slots that are not aligned to 4096
        bytes. A slab in use is waited for up to `wait_s`: the kernel ends the I/O of a killed process after it, and
        only then lets go of the lock. Raises SlabError.
        """
        assert 0 < slot_bytes <= _MAX_SLOT_BYTES
        num_slots = (num_bytes - _OVERHEAD_BYTES) // (slot_bytes + RECORD_BYTES)
        if num_slots < 1:
            smallest = _OVERHEAD_BYTES + slot_bytes + RECORD_BYTES
            raise SlabError(f"NVMe budget of {num_bytes} bytes for {directory}: raise it to {smallest} for one slot")
        layout = Layout(namespace_digest(namespace), slot_bytes, num_slots)
        path = Path(directory) / f"impala-{name}.slab"
        with contextlib.ExitStack() as undo:
            try:
                tightened = make_private(Path(directory))
                if tightened is not None:
                    logger.warning("%s", tightened)
                fd = _open(path)
                undo.callback(os.close, fd)
                _lock(fd, path, wait_s)
                index_fd = _open(path.with_suffix(".index"))
                undo.callback(os.close, index_fd)
                slab = cls(fd, index_fd, path, layout, is_direct=False)
                slab._load()
                slab.is_direct = direct and slot_bytes % DIRECT_ALIGNMENT_BYTES == 0 and use_direct(fd)
            except NotPrivateError as error:
                raise SlabError(str(error)) from error
            except OSError as error:
                raise SlabError(_explain(error, path, num_bytes)) from error
            undo.pop_all()
        return slab

    @property
    def probe_offset_bytes(self) -> int:
        """Where PROBE_BYTES bytes lie in the data file that hold nothing."""
        return _data_bytes(self._layout) - PROBE_BYTES

    def offset_bytes(self, slot: int) -> int:
        """Where a slot's data starts in the data file."""
        return slot * self.slot_bytes

    def record(self, slot: int) -> Record | None:
        """What the slot holds; None: nothing."""
        return self._records.get(slot)

    def invalidate(self, slot: int) -> None:
        """Forget what the slot holds; to be called before its data is overwritten. Raises OSError."""
        if self._records.drop(slot):
            _write(self._index_fd, EMPTY_RECORD, record_offset(slot))

    def commit(self, slot: int, key: bytes, length: int, checksum: int, parent: bytes | None = None) -> None:
        """Note what the slot holds, its data being written. Raises OSError; the slot then holds nothing.

        `parent`: the key without which this one is of no use.
        """
        assert self._records.get(slot) is None
        assert length <= self.slot_bytes
        record = self._records.put(slot, key, length, checksum, parent)
        try:
            _write(self._index_fd, record, record_offset(slot))
        except OSError:
            self._records.drop(slot)
            raise

    def clear(self) -> None:
        """Forget everything, on disk too; from now on, what is written is this process's alone and not recovered.

        A reset may mean that weights were changed in memory. Raises OSError; in memory all is forgotten nevertheless.
        """
        self._empty(self._layout._replace(namespace=VOID))

    def add_written(self, num_bytes: int, day: int) -> None:
        """Count bytes written to the device on a UTC day; `save_wear` makes them last."""
        before = self.wear.day_bytes if day == self.wear.day else 0
        self.wear = Wear(day, before + num_bytes, self.wear.total_bytes + num_bytes)
        self._is_wear_saved = False

    def save_wear(self) -> None:
        """Write the wear to the index where it changed. Raises OSError."""
        if not self._is_wear_saved:
            self._is_wear_saved = True
            _write(self._index_fd, encode_wear(self.wear), WEAR_OFFSET_BYTES)

    def close(self) -> None:
        """Save the wear and let go of the files, nothing being in flight. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        with contextlib.suppress(OSError):
            self.save_wear()
        fcntl.flock(self.fd, fcntl.LOCK_UN)  # duplicates of the descriptor may live on for a moment
        os.close(self._index_fd)
        os.close(self.fd)

    def _load(self) -> None:
        """Take over the files' contents or drop them, and bring both files to their sizes."""
        header = os.pread(self._index_fd, HEADER_BYTES, 0)
        data_bytes, index_bytes = os.fstat(self.fd).st_size, os.fstat(self._index_fd).st_size
        self.wear = decode_wear(header)
        self.dropped = difference(header, self._layout)
        if self.dropped is None and data_bytes != _data_bytes(self._layout):
            self.dropped = f"its data file is {data_bytes} bytes, not {_data_bytes(self._layout)}"
        if self.dropped is None and index_bytes != _index_bytes(self._layout):
            self.dropped = f"its index file is {index_bytes} bytes, not {_index_bytes(self._layout)}"
        if self.dropped is None:
            self._scan()
            return
        if not header and not data_bytes:
            self.dropped = None
        else:
            logger.warning("%s starts empty: %s", self.path, self.dropped)
        self._allocate()

    def _allocate(self) -> None:
        """Make both files anew at full size, or leave them empty and raise OSError."""
        os.ftruncate(self._index_fd, 0)
        try:
            os.ftruncate(self.fd, min(os.fstat(self.fd).st_size, _data_bytes(self._layout)))
            _check_room(self.fd, _data_bytes(self._layout) + _index_bytes(self._layout))
            os.posix_fallocate(self.fd, 0, _data_bytes(self._layout))
            self._empty(self._layout)
        except OSError:
            os.ftruncate(self._index_fd, 0)
            os.ftruncate(self.fd, 0)
            raise

    def _empty(self, layout: Layout) -> None:
        """Make the index anew, without records and with the layout's header."""
        self._records = Records(self.num_slots, self._layout.seed)
        os.ftruncate(self._index_fd, 0)  # the old records are gone before the new header is valid
        os.posix_fallocate(self._index_fd, 0, _index_bytes(self._layout))
        self._is_wear_saved = False
        self.save_wear()
        _write(self._index_fd, encode_header(layout), 0)

    def _scan(self) -> None:
        """Read every record; on disk, drop those that are torn or that a later write of their key made stale."""
        started_s = time.monotonic()
        empty = bytes(_SCAN_RECORDS * RECORD_BYTES)
        torn: list[int] = []
        for first in range(0, self.num_slots, _SCAN_RECORDS):
            num_bytes = min(_SCAN_RECORDS, self.num_slots - first) * RECORD_BYTES
            chunk = os.pread(self._index_fd, num_bytes, record_offset(first))
            if len(chunk) != num_bytes:
                raise OSError(errno.EIO, "the index file is shorter than it was")
            if chunk != empty:
                torn += self._records.load(chunk, first)
        self.recovered, stale = self._records.by_key()
        for slot in (*torn, *stale):
            _write(self._index_fd, EMPTY_RECORD, record_offset(slot))
        self.num_torn = len(torn)
        if torn:
            logger.warning("%s: dropped %d damaged records", self.path, self.num_torn)
        self.scan_s = time.monotonic() - started_s


def _data_bytes(layout: Layout) -> int:
    blocks = -(-layout.num_slots * layout.slot_bytes // DIRECT_ALIGNMENT_BYTES)
    return blocks * DIRECT_ALIGNMENT_BYTES + PROBE_BYTES


def _index_bytes(layout: Layout) -> int:
    return HEADER_BYTES + layout.num_slots * RECORD_BYTES


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _lock(fd: int, path: Path, wait_s: float) -> None:
    """Keep the slab to ourselves as long as the open file or a duplicate of it lives."""
    give_up_s = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= give_up_s:
                break
        time.sleep(_LOCK_RETRY_S)
    raise SlabError(f"{path} is in use by another process: give every server a directory of its own")


def _check_room(fd: int, num_bytes: int) -> None:
    """Raise OSError where the file cannot grow to this size, before other users of the disk notice."""
    disk = os.fstatvfs(fd)
    room = disk.f_bavail * disk.f_frsize + os.fstat(fd).st_blocks * 512
    if disk.f_blocks and num_bytes > room:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {room} bytes are free")


def _write(fd: int, data: bytes, offset: int) -> None:
    if os.pwrite(fd, data, offset) != len(data):
        raise OSError(errno.EIO, f"short write of {len(data)} bytes at {offset}")


def _explain(error: OSError, path: Path, num_bytes: int) -> str:
    hint = _HINTS.get(error.errno or 0, "choose another directory, or run without an NVMe tier")
    where = error.filename or path
    return f"cannot open an NVMe slab of {num_bytes} bytes: {where}: {error.strerror or error}; {hint}"

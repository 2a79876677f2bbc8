"""The door to the native module: the same answers with it and without it.

A wheel built without a compiler has no `impala_vllm._native`; what only native code can find out
is then unknown, and nothing else changes.
"""

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol


@dataclass(frozen=True, slots=True)
class BlockIo:
    """What block I/O a directory offers. None: unknown, because the native module is absent."""

    io_uring: bool | None = None
    """As `can_use_io_uring`."""
    direct_io: bool | None = None
    """The file system takes O_DIRECT, proven by a write and a read."""
    direct_alignment_bytes: int | None = None
    """Multiple that address, offset and length need for it; None also where `direct_io` is False."""


def is_built() -> bool:
    """Whether this installation carries the native module."""
    return _native() is not None


def probe_block_io(directory: str | os.PathLike[str]) -> BlockIo:
    """Try block I/O with a temporary file in `directory`; leaves nothing behind.

    Raises OSError where the native module is present and the directory cannot be written.
    """
    native = _native()
    if native is None:
        return BlockIo()
    found = native.probe_block_io(os.fspath(directory))
    alignment = found.direct_alignment_bytes
    return BlockIo(found.io_uring, alignment is not None, alignment)


def can_use_io_uring() -> bool:
    """Whether the kernel lets this process make an io_uring and does what it is asked for, proven by a read.

    Takes three seconds where it is asked and never answers. Raises AttributeError with a module of an earlier build.
    """
    native = _native()
    return native is not None and native.can_use_io_uring()


class UringFile(Protocol):
    """I/O on one open file by io_uring; `transfer.uring_io` says what the calls do."""

    @property
    def num_in_flight(self) -> int: ...

    def register_region(self, region: memoryview) -> None: ...

    def submit(self, ops: Iterable[object]) -> None:
        """Ops have the attributes of `transfer.block_io.Op`."""
        ...

    def poll(self, timeout_s: float) -> list[tuple[int, int, str, int | None, float]]:
        """Token, errno or 0, its message, checksum where the build has it and there is no error, seconds."""
        ...

    def cancel(self, token: int) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def open_uring_file(fd: int, depth: int, alignment_bytes: int, deadline_s: float | None) -> UringFile:
    """Raises OSError: ENOSYS without the native module or io_uring, EPERM where it is forbidden."""
    native = _native()
    if native is None:
        raise OSError(errno.ENOSYS, "impala_vllm was built without its native module")
    return native.UringFile(fd, depth, alignment_bytes, deadline_s)


def has_checksum() -> bool:
    """Whether the native module takes checksums; it was built with libxxhash's header then."""
    native = _native()
    return native is not None and native.HAS_CHECKSUM


def _native() -> ModuleType | None:
    try:
        from impala_vllm import _native
    except ImportError:
        return None
    return _native

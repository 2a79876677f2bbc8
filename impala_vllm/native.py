"""The door to the native module: the same answers with it and without it.

A wheel built without a compiler has no `impala_vllm._native`; what only native code can find out
is then unknown, and nothing else changes.
"""

import os
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True, slots=True)
class BlockIo:
    """What block I/O a directory offers. None: unknown, because the native module is absent."""

    io_uring: bool | None = None
    """The kernel lets this process make an io_uring."""
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


def _native() -> ModuleType | None:
    try:
        from impala_vllm import _native
    except ImportError:
        return None
    return _native

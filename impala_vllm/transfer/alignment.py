"""What O_DIRECT asks of a file and of memory: whether a file takes it, where a buffer lies, which ops are fit.

4096 bytes satisfy every disk sector and file system block in use here; smaller alignments are not worth telling apart.
"""

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Collection, Sequence

from impala_vllm.transfer.block_io import Op

DIRECT_ALIGNMENT_BYTES = 4096


def use_direct(fd: int) -> bool:
    """Switch an open file of at least one block to O_DIRECT, proven by a read. False: it stays buffered.

    Other descriptors of the same open file are switched too. Raises OSError when the file cannot be read at all.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    buffer = aligned_buffer(DIRECT_ALIGNMENT_BYTES)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(fd, [buffer], 0)
    except OSError as error:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        return False
    return True


def is_direct(fd: int) -> bool:
    """Whether reads and writes on this descriptor bypass the page cache."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def aligned_buffer(num_bytes: int) -> memoryview:
    """Zeroed private memory at a page boundary; it lives as long as views of it do."""
    return memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def address_of(buffer: memoryview) -> int:
    """Where the buffer's first byte lies. O(1), about a microsecond; works on read-only buffers too."""
    view = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(view), 0)
    try:
        return view.buf or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))


def check_ops(ops: Sequence[Op], alignment_bytes: int, in_flight: Collection[int] = ()) -> None:
    """Raise ValueError for the first op that an engine of this alignment must not start; `in_flight` are tokens."""
    tokens: set[int] = set()
    for op in ops:
        buffer = op.buffer
        if op.token in in_flight or op.token in tokens:
            raise ValueError(f"op {op.token}: another op in flight has this token")
        tokens.add(op.token)
        if not buffer.nbytes:
            raise ValueError(f"op {op.token}: the buffer is empty")
        if not buffer.contiguous:
            raise ValueError(f"op {op.token}: the buffer is not contiguous")
        if buffer.readonly and not op.is_write:
            raise ValueError(f"op {op.token}: the buffer to read into is read-only")
        if op.offset_bytes < 0:
            raise ValueError(f"op {op.token}: the offset {op.offset_bytes} is negative")
        if alignment_bytes == 1:
            continue
        if (address_of(buffer) | op.offset_bytes | buffer.nbytes) % alignment_bytes:
            raise ValueError(
                f"op {op.token}: address {address_of(buffer):#x}, offset {op.offset_bytes} and length {buffer.nbytes} "
                f"must be multiples of {alignment_bytes}"
            )


class _PyBuffer(ctypes.Structure):
    """CPython's `Py_buffer`."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_ssize_t)),
        ("strides", ctypes.POINTER(ctypes.c_ssize_t)),
        ("suboffsets", ctypes.POINTER(ctypes.c_ssize_t)),
        ("internal", ctypes.c_void_p),
    )

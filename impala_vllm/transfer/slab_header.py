"""The first page of a slab's index file: what its contents are of, and how much was written. No I/O here.

All integers on disk are little-endian.
"""

import struct
import zlib
from hashlib import blake2b
from typing import NamedTuple

HEADER_BYTES = 4096
WEAR_OFFSET_BYTES = 512
"""A disk sector of its own: the wear is rewritten all the time, the rest never."""

VOID = bytes(32)
"""The namespace of contents that no later process may use."""

_MAGIC = b"impalaKV"
_VERSION = 2
_HEADER = struct.Struct("<8sI32sQQ")
_WEAR = struct.Struct("<IQQ")
_CRC_BYTES = 4


class Layout(NamedTuple):
    """What the contents depend on: with another layout they mean nothing."""

    namespace: bytes
    """Digest of everything that makes KV differ, 32 bytes."""
    slot_bytes: int
    num_slots: int

    @property
    def seed(self) -> int:
        """Where the CRCs of its records start: one of another slab is not valid here."""
        return zlib.crc32(_HEADER.pack(_MAGIC, _VERSION, *self))


class Wear(NamedTuple):
    """Bytes written to the slab, for the wear of the device."""

    day: int = 0
    """UTC day the count is of, in days since 1970."""
    day_bytes: int = 0
    total_bytes: int = 0


def namespace_digest(namespace: str | bytes) -> bytes:
    """32 bytes that stand for a namespace of any length."""
    return blake2b(namespace.encode() if isinstance(namespace, str) else namespace, digest_size=32).digest()


def encode_header(layout: Layout) -> bytes:
    """The start of the page, without the wear."""
    return _with_crc(_HEADER.pack(_MAGIC, _VERSION, *layout))


def difference(header: bytes, layout: Layout) -> str | None:
    """Why the contents under this page are not of this layout; None when they are."""
    if header[: len(_MAGIC)] != _MAGIC or not _is_whole(header, _HEADER.size):
        return "it has no valid header"
    _, version, namespace, slot_bytes, num_slots = _HEADER.unpack_from(header)
    if version != _VERSION:
        return f"its format is version {version}, not {_VERSION}"
    if slot_bytes != layout.slot_bytes:
        return f"its slots are {slot_bytes} bytes, not {layout.slot_bytes}"
    if num_slots != layout.num_slots:
        return f"it has {num_slots} slots, not {layout.num_slots}"
    if namespace == VOID:
        return "it was written after a reset, maybe with other weights"
    if namespace != layout.namespace:
        return "it was written by another model, configuration or version"
    return None


def encode_wear(wear: Wear) -> bytes:
    """What lies at WEAR_OFFSET_BYTES."""
    return _with_crc(_WEAR.pack(*wear))


def decode_wear(header: bytes) -> Wear:
    """The wear in the page; none where it is not valid."""
    found = header[WEAR_OFFSET_BYTES:]
    if not any(found) or not _is_whole(found, _WEAR.size):
        return Wear()
    return Wear._make(_WEAR.unpack_from(found))


def _with_crc(fields: bytes) -> bytes:
    return fields + zlib.crc32(fields).to_bytes(_CRC_BYTES, "little")


def _is_whole(data: bytes, num_bytes: int) -> bool:
    """Whether the CRC behind the first `num_bytes` bytes is theirs."""
    crc = data[num_bytes : num_bytes + _CRC_BYTES]
    return len(crc) == _CRC_BYTES and int.from_bytes(crc, "little") == zlib.crc32(data[:num_bytes])

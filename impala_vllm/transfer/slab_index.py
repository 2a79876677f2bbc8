"""The bytes of a slab's index file: one header page, then one fixed-size record a slot. No I/O here.

A record is valid where its CRC is; the CRC covers slot number, namespace and sizes, so that a record of another slab or
place never is. All integers are little-endian.
"""

import struct
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from typing import NamedTuple

HEADER_BYTES = 4096
RECORD_BYTES = 128
"""A power of two: no record crosses a disk sector."""
MAX_KEY_BYTES = 64
EMPTY_RECORD = bytes(RECORD_BYTES)

_MAGIC = b"impalaKV"
_VERSION = 1
_HEADER = struct.Struct("<8sII32sQQ")
_WEAR = struct.Struct("<IQQ")
_WEAR_OFFSET = 512  # a sector of its own: it is rewritten all the time, the header never
_CRC = struct.Struct("<I")
_RECORD = struct.Struct("<88sI36x")
_BODY = struct.Struct("<64sB3xIQQ")
_EMPTY_BODY = bytes(_BODY.size)


class Record(NamedTuple):
    """What a slot holds."""

    key: bytes
    length: int
    """Bytes of data, from the slot's start."""
    checksum: int
    """XXH3, 64 bit, of the data."""
    sequence: int
    """Grows with every write to the slab: of two records with one key, the larger is the later."""


class Layout(NamedTuple):
    """What the contents depend on: with another layout they mean nothing."""

    namespace: bytes
    """Digest of everything that makes KV differ, 32 bytes."""
    slot_bytes: int
    num_slots: int

    @property
    def seed(self) -> int:
        """Start value of the records' CRCs."""
        return zlib.crc32(_HEADER.pack(_MAGIC, _VERSION, RECORD_BYTES, *self))

    @property
    def index_bytes(self) -> int:
        return HEADER_BYTES + self.num_slots * RECORD_BYTES


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
    """The start of the index file, without the wear."""
    header = _HEADER.pack(_MAGIC, _VERSION, RECORD_BYTES, *layout)
    return header + _CRC.pack(zlib.crc32(header))


def difference(header: bytes, layout: Layout) -> str | None:
    """Why the contents under this header are not of this layout; None when they are."""
    fields, crc = header[: _HEADER.size], header[_HEADER.size : _HEADER.size + _CRC.size]
    if len(crc) < _CRC.size or fields[: len(_MAGIC)] != _MAGIC or _CRC.pack(zlib.crc32(fields)) != crc:
        return "it has no valid header"
    _, version, record_bytes, namespace, slot_bytes, num_slots = _HEADER.unpack(fields)
    if (version, record_bytes) != (_VERSION, RECORD_BYTES):
        return f"its format is version {version}, not {_VERSION}"
    if slot_bytes != layout.slot_bytes:
        return f"its slots are {slot_bytes} bytes, not {layout.slot_bytes}"
    if num_slots != layout.num_slots:
        return f"it has {num_slots} slots, not {layout.num_slots}"
    if namespace != layout.namespace:
        return "it was written by another model, configuration or version"
    return None


def wear_offset() -> int:
    """Where the wear lies in the index file."""
    return _WEAR_OFFSET


def encode_wear(wear: Wear) -> bytes:
    body = _WEAR.pack(*wear)
    return body + _CRC.pack(zlib.crc32(body))


def decode_wear(header: bytes) -> Wear:
    """The wear in a header page; nothing where it is not valid."""
    body = header[_WEAR_OFFSET : _WEAR_OFFSET + _WEAR.size]
    crc = header[_WEAR_OFFSET + _WEAR.size : _WEAR_OFFSET + _WEAR.size + _CRC.size]
    if len(crc) < _CRC.size or _CRC.pack(zlib.crc32(body)) != crc or body == bytes(_WEAR.size):
        return Wear()
    return Wear._make(_WEAR.unpack(body))


def record_offset(slot: int) -> int:
    """Where a slot's record lies in the index file."""
    return HEADER_BYTES + slot * RECORD_BYTES


def encode_record(record: Record, slot: int, seed: int) -> bytes:
    """RECORD_BYTES bytes. The key is 1 to MAX_KEY_BYTES long."""
    key = record.key
    assert 0 < len(key) <= MAX_KEY_BYTES
    body = _BODY.pack(key, len(key), record.length, record.checksum, record.sequence)
    return _RECORD.pack(body, zlib.crc32(body, (seed + slot) & 0xFFFFFFFF))


def decode_records(chunk: bytes, first_slot: int, seed: int) -> Iterator[tuple[int, Record | None]]:
    """Slots and records of a run of whole records, the empty ones left out; None for a torn one. 1 us a record."""
    slot = first_slot - 1
    for body, crc in _RECORD.iter_unpack(chunk):
        slot += 1
        if not crc and body == _EMPTY_BODY:
            continue
        if zlib.crc32(body, (seed + slot) & 0xFFFFFFFF) != crc:
            yield slot, None
            continue
        key, key_bytes, length, checksum, sequence = _BODY.unpack(body)
        yield slot, Record(key[:key_bytes], length, checksum, sequence)

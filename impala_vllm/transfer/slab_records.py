"""What a slab's slots hold: the records, in memory and as bytes of the index file. No I/O here.

A record is valid where its CRC is, which covers the slot's number as well. All integers on disk are little-endian.
"""

import struct
import zlib
from array import array
from typing import NamedTuple

from impala_vllm.transfer.slab_header import HEADER_BYTES

RECORD_BYTES = 128
"""A power of two: no record crosses a disk sector."""
EMPTY_RECORD = bytes(RECORD_BYTES)
MAX_KEY_BYTES = 64

_RECORD = struct.Struct("<88sI36x")
_BODY = struct.Struct("<64sB3xIQQ")
_EMPTY_BODY = bytes(_BODY.size)


class Record(NamedTuple):
    """What a slot holds."""

    key: bytes
    """1 to MAX_KEY_BYTES long."""
    length: int
    """Bytes of data, from the slot's start; below 4 GiB."""
    checksum: int
    """XXH3, 64 bit, of the data."""
    sequence: int
    """Grows with every write to the slab, from 1: of two records with one key, the larger is the later."""


class Records:
    """The records by slot, in columns: 20 bytes a slot beside the keys."""

    def __init__(self, num_slots: int, seed: int) -> None:
        self._seed = seed
        self._keys: list[bytes | None] = [None] * num_slots
        self._lengths = array("I", bytes(4 * num_slots))
        self._checksums = array("Q", bytes(8 * num_slots))
        self._sequences = array("Q", bytes(8 * num_slots))
        self._last_sequence = 0

    def get(self, slot: int) -> Record | None:
        """What the slot holds; None: nothing."""
        key = self._keys[slot]
        return None if key is None else Record(key, self._lengths[slot], self._checksums[slot], self._sequences[slot])

    def put(self, slot: int, key: bytes, length: int, checksum: int) -> bytes:
        """Note what the slot holds from now on. Returns its bytes in the index."""
        assert 0 < len(key) <= MAX_KEY_BYTES
        self._last_sequence += 1
        self._keys[slot], self._lengths[slot] = key, length
        self._checksums[slot], self._sequences[slot] = checksum, self._last_sequence
        body = _BODY.pack(key, len(key), length, checksum, self._last_sequence)
        return _RECORD.pack(body, zlib.crc32(body, (self._seed + slot) & 0xFFFFFFFF))

    def drop(self, slot: int) -> bool:
        """The slot holds nothing. Returns whether it held something."""
        held = self._keys[slot] is not None
        self._keys[slot] = None
        return held

    def load(self, chunk: bytes, first_slot: int) -> list[int]:
        """Take over whole records as they lie on disk. Returns the slots of torn ones. About 1 us a record."""
        torn: list[int] = []
        keys, lengths, checksums, sequences = self._keys, self._lengths, self._checksums, self._sequences
        crc32, unpack = zlib.crc32, _BODY.unpack
        slot = first_slot
        for body, crc in _RECORD.iter_unpack(chunk):
            if crc32(body, (self._seed + slot) & 0xFFFFFFFF) == crc:
                key, key_bytes, lengths[slot], checksums[slot], sequences[slot] = unpack(body)
                keys[slot] = key[:key_bytes]
            elif crc or body != _EMPTY_BODY:
                torn.append(slot)
            slot += 1
        return torn

    def by_key(self) -> tuple[dict[bytes, int], list[int]]:
        """Slot by key, oldest write first; and the slots that hold an earlier write of such a key, now dropped.

        Also makes the next sequence larger than all found. O(slots log slots).
        """
        found: dict[bytes, int] = {}
        stale: list[int] = []
        keys = self._keys
        order = sorted(range(len(keys)), key=self._sequences.__getitem__)
        for slot in order:
            key = keys[slot]
            if key is None:
                continue
            earlier = found.pop(key, None)
            if earlier is not None:
                keys[earlier] = None
                stale.append(earlier)
            found[key] = slot
        if order:
            self._last_sequence = max(self._last_sequence, self._sequences[order[-1]])
        return found, stale


def record_offset(slot: int) -> int:
    """Where a slot's record lies in the index file."""
    return HEADER_BYTES + slot * RECORD_BYTES

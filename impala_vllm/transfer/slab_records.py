"""What a slab's slots hold: the records, in memory and as bytes of the index file. No I/O here.

A record is valid where its CRC is, which covers the slot's number as well. All integers on disk are little-endian.
"""

import struct
import zlib
from array import array
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from impala_vllm.transfer.slab_header import HEADER_BYTES

RECORD_BYTES = 128
"""A power of two: no record crosses a disk sector."""
EMPTY_RECORD = bytes(RECORD_BYTES)
MAX_KEY_BYTES = 64

_RECORD = struct.Struct("<96sI28x")
_BODY = struct.Struct("<64sB3xIQQQ")
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
    """The records by slot, in columns: 28 bytes a slot beside the keys."""

    def __init__(self, num_slots: int, seed: int) -> None:
        self._seed = seed
        self._keys: list[bytes | None] = [None] * num_slots
        self._lengths = array("I", bytes(4 * num_slots))
        self._checksums = array("Q", bytes(8 * num_slots))
        self._sequences = array("Q", bytes(8 * num_slots))
        self._parents = array("Q", bytes(8 * num_slots))
        """Digests of keys; 0: none."""
        self._last_sequence = 0

    def get(self, slot: int) -> Record | None:
        """What the slot holds; None: nothing."""
        key = self._keys[slot]
        return None if key is None else Record(key, self._lengths[slot], self._checksums[slot], self._sequences[slot])

    def put(self, slot: int, key: bytes, length: int, checksum: int, parent: bytes | None = None) -> bytes:
        """Note what the slot holds from now on, and the key without which it is of no use. Returns its bytes."""
        assert 0 < len(key) <= MAX_KEY_BYTES
        self._last_sequence += 1
        self._keys[slot], self._lengths[slot] = key, length
        self._checksums[slot], self._sequences[slot] = checksum, self._last_sequence
        self._parents[slot] = xxh3_64_intdigest(parent) if parent is not None else 0
        body = _BODY.pack(key, len(key), length, checksum, self._last_sequence, self._parents[slot])
        return _RECORD.pack(body, zlib.crc32(body, (self._seed + slot) & 0xFFFFFFFF))

    def drop(self, slot: int) -> bool:
        """The slot holds nothing. Returns whether it held something."""
        held = self._keys[slot] is not None
        self._keys[slot] = None
        return held

    def load(self, chunk: bytes, first_slot: int) -> list[int]:
        """Take over whole records as they lie on disk. Returns the slots of torn ones. About 1 us a record."""
        torn: list[int] = []
        keys, lengths, checksums = self._keys, self._lengths, self._checksums
        sequences, parents = self._sequences, self._parents
        crc32, unpack = zlib.crc32, _BODY.unpack
        slot = first_slot
        for body, crc in _RECORD.iter_unpack(chunk):
            if crc32(body, (self._seed + slot) & 0xFFFFFFFF) == crc:
                key, key_bytes, lengths[slot], checksums[slot], sequences[slot], parents[slot] = unpack(body)
                keys[slot] = key[:key_bytes]
            elif crc or body != _EMPTY_BODY:
                torn.append(slot)
            slot += 1
        return torn

    def by_key(self) -> tuple[dict[bytes, int], list[int]]:
        """Slot by key, what can be spared first; and the slots that hold an earlier write of such a key, now dropped.

        A key goes before its parent, and otherwise before what was written later or has a child that was. Also makes
        the next sequence larger than all found. O(slots log slots).
        """
        slots: dict[bytes, int] = {}
        stale: list[int] = []
        keys = self._keys
        for slot in sorted(range(len(keys)), key=self._sequences.__getitem__, reverse=True):
            key = keys[slot]
            if key is None:
                continue
            if slots.setdefault(key, slot) != slot:
                keys[slot] = None
                stale.append(slot)
        self._last_sequence = max(self._last_sequence, max(self._sequences, default=0))
        return self._sparable_first(slots), stale

    def _sparable_first(self, slots: dict[bytes, int]) -> dict[bytes, int]:
        """The same slots by key, which come newest write first."""
        named = {xxh3_64_intdigest(key): key for key in slots}
        last: dict[bytes, int] = {}
        """Turned round: what is to go last comes first, each key behind its parent."""
        for newest in slots:
            path: dict[bytes, int] = {}
            key: bytes | None = newest
            while key is not None and key not in last and key not in path:
                path[key] = slots[key]
                key = named.get(self._parents[path[key]])
            last.update(reversed(path.items()))
        return dict(reversed(last.items()))


def record_offset(slot: int) -> int:
    """Where a slot's record lies in the index file."""
    return HEADER_BYTES + slot * RECORD_BYTES

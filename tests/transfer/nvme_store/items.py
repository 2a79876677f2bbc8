"""Items for a small slab: what is written, and room for what is read."""

import random
from collections.abc import Sequence

from impala_vllm.transfer.alignment import aligned_buffer
from impala_vllm.transfer.jobs import Item

SLOT_BYTES = 64 << 10
BUDGET_BYTES = 16 << 20


def key_of(slot: int) -> bytes:
    return b"key%d" % slot


def data_of(slot: int) -> bytes:
    return random.Random(slot).randbytes(SLOT_BYTES)


def to_write(slots: Sequence[int]) -> list[Item]:
    items = to_read(slots)
    for item in items:
        item.buffer[:] = data_of(item.slot)
    return items


def to_read(slots: Sequence[int]) -> list[Item]:
    return [Item(key_of(slot), slot, aligned_buffer(SLOT_BYTES)) for slot in slots]

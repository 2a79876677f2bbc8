"""Where a block of KV may be: a tier of a replica. Block keys are the engine's hashes cut to 64 bits.

vLLM itself cuts its hashes so where events carry integers, so both spellings meet here. Two prompts that
collide cost a wrong guess of a router, never a wrong token: the engine compares its own full hashes.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple, NewType

ServerId = NewType("ServerId", str)
"""A server as the router calls it: its base URL."""

BlockKey = NewType("BlockKey", int)
"""The last 64 bits of a block hash. Chained, as the hash is: equal key means equal whole prefix."""

_MASK = (1 << 64) - 1


class Tier(IntEnum):
    """Nearest first; a load from a later one takes longer."""

    HBM = 0
    HOST = 1
    NVME = 2
    REMOTE = 3
    """Outside the server, at a store that others may share."""


class Replica(NamedTuple):
    """One engine: each data-parallel rank of a server has a scheduler and KV of its own."""

    server: ServerId
    dp_rank: int = 0


def key_of(block_hash: bytes | int) -> BlockKey:
    """The key of a hash as vLLM writes it, bytes or integer."""
    if isinstance(block_hash, bytes):
        return BlockKey(int.from_bytes(block_hash[-8:], "big"))
    return BlockKey(block_hash & _MASK)


def keys_of(hashes: Iterable[bytes | int]) -> list[BlockKey]:
    """`key_of` each."""
    return [key_of(h) for h in hashes]

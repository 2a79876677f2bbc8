"""What a replica holds in HBM at one moment of its event stream, read page by page from impala's middleware.

The engine marks the moment with a batch of its own in the stream; `written_s` is that batch's time stamp.
"""

import base64
import binascii
import struct
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec

from impala_vllm.fleet.events.wire import Stored
from impala_vllm.fleet.places import BlockKey, Tier

MAX_PAGES = 10_000
_KEY = struct.Struct(">QI")


class SnapshotError(Exception):
    """Not to be had now."""


class Snapshot(NamedTuple):
    """What was held right after the batch of that time stamp."""

    written_s: float
    stored: list[Stored]
    """One copy of each block, a group each."""


class Page(msgspec.Struct):
    """As it is served."""

    written_s: float
    keys: str
    """Base64; of each block the last 8 bytes of its hash and its group in 4."""
    next: str | None = None
    """What to ask for the following page; None: this is the last."""


async def read(ask: Callable[[str | None], Awaitable[bytes]]) -> Snapshot:
    """All pages; `ask` gets the body of the page at a cursor. Raises SnapshotError, and what `ask` raises."""
    groups: dict[int, list[BlockKey]] = {}
    after: str | None = None
    written_s: float | None = None
    for _ in range(MAX_PAGES):
        try:
            page = msgspec.json.decode(await ask(after), type=Page)
            for key, group in _KEY.iter_unpack(base64.b64decode(page.keys, validate=True)):
                groups.setdefault(group, []).append(BlockKey(key))
        except (msgspec.DecodeError, binascii.Error, struct.error) as e:
            raise SnapshotError("not a page of a snapshot") from e
        if written_s not in (None, page.written_s):
            raise SnapshotError("pages of different moments")
        written_s, after = page.written_s, page.next
        if after is None:
            return Snapshot(written_s, [Stored(Tier.HBM, keys, group) for group, keys in groups.items()])
    raise SnapshotError("it does not end")

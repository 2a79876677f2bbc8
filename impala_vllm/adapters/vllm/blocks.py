"""A snapshot of the blocks an engine holds in HBM, for followers of its events that missed some (`fleet.events`).

The first question takes a copy of the pool's keys between two steps and marks that moment in the stream of events: with
a batch whose time stamp the answer repeats. Pages are slices of the copy, which is one loop in C. Hashes only.
"""

import time
import uuid
from typing import Any, NamedTuple

MAX_BLOCKS = 20_000
"""Most blocks in a page: about a millisecond of the engine loop."""
KEPT_S = 30.0
MAX_COPIES = 4
"""Kept at once; further routers are told to come back."""
KEY_BYTES = 12
"""The last 8 bytes of a hash and 4 of its group: how vLLM's own keys end."""


class _Copy(NamedTuple):
    keys: list[bytes]
    written_s: float
    taken_s: float


class Blocks:
    """One engine's copies. Used on the engine loop's thread."""

    def __init__(self) -> None:
        self._copies: dict[str, _Copy] = {}

    def page(self, scheduler: Any, after: str | None, limit: int) -> dict[str, Any]:
        """The next page, or why there is none: `error` is "off", "busy" or "gone"."""
        now = time.monotonic()
        for token in [t for t, copy in self._copies.items() if now - copy.taken_s > KEPT_S]:
            del self._copies[token]
        token, _, start = (after or "").partition(":")
        if after is None:
            if not _has_events(scheduler):
                return {"error": "off"}
            if len(self._copies) >= MAX_COPIES:
                return {"error": "busy"}
            token, start = uuid.uuid4().hex, "0"
            self._copies[token] = _take(scheduler, now)
        copy = self._copies.get(token)
        if copy is None:
            return {"error": "gone"}
        end = int(start) + max(1, min(limit, MAX_BLOCKS))
        found = b"".join([key[-KEY_BYTES:] for key in copy.keys[int(start) : end]])
        has_more = end < len(copy.keys)
        if not has_more:
            del self._copies[token]
        following = f"{token}:{end}" if has_more else None
        return {"written_s": copy.written_s, "total": len(copy.keys), "keys": found, "next": following}


def _take(scheduler: Any, now: float) -> _Copy:
    """Copy, and publish what the copy shows already: the batch that says so stands right behind it in the stream."""
    from vllm.distributed.kv_events import KVEventBatch

    manager = scheduler.kv_cache_manager
    keys = list(manager.block_pool.cached_block_hash_to_block._cache)
    written_s = time.time()
    scheduler.kv_event_publisher.publish(KVEventBatch(ts=written_s, events=manager.take_events() or []))
    return _Copy(keys, written_s, now)


def _has_events(scheduler: Any) -> bool:
    config = scheduler.get_kv_event_publisher_config()
    return config is not None and bool(config.enable_kv_cache_events) and config.publisher == "zmq"

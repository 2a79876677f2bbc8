"""Snapshots of what an engine holds: pages, bounds, who may read them."""

import json
import struct
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from impala_vllm.adapters.vllm import blocks, snapshot
from impala_vllm.fleet.events import snapshot as wire
from impala_vllm.fleet.events.wire import Stored
from impala_vllm.fleet.places import Tier
from tests.adapters.vllm.asgi import Site


class Publisher:
    def __init__(self) -> None:
        self.batches: list[Any] = []

    def publish(self, batch: Any) -> None:
        self.batches.append(batch)


def key(number: int, group: int = 0) -> bytes:
    return bytes(24) + struct.pack(">QI", number, group)


def scheduler(keys: list[bytes], is_on: bool = True, pending: list[Any] | None = None) -> Any:
    """The attributes of vLLM's scheduler that a snapshot reads."""
    pool = SimpleNamespace(cached_block_hash_to_block=SimpleNamespace(_cache=dict.fromkeys(keys)))
    return SimpleNamespace(
        kv_cache_manager=SimpleNamespace(block_pool=pool, take_events=lambda: pending),
        kv_event_publisher=Publisher(),
        get_kv_event_publisher_config=lambda: SimpleNamespace(enable_kv_cache_events=is_on, publisher="zmq"),
    )


def serve(site: Site, engine: Any) -> None:
    """Questions reach `engine` as they would through the wire."""

    async def utility(name: str, page: dict[str, Any]) -> list[dict[str, Any]]:
        assert name == "impala_snapshot"
        return [snapshot.take(engine, 0, page)]

    site.core.call_utility_all_async = utility


async def test_pages_are_one_moment_and_pending_events_are_in_the_batch_that_marks_it():
    site, engine = Site(), scheduler([*(key(n) for n in range(25)), key(7, 1)], pending=["an event"])
    serve(site, engine)
    cache = engine.kv_cache_manager.block_pool.cached_block_hash_to_block._cache

    async def ask(after: str | None) -> bytes:
        status, _, body = await site.request("GET", f"/impala/blocks?limit=10{f'&after={after}' if after else ''}")
        assert status == 200
        cache.clear()  # a later step
        return body

    found = await wire.read(ask)
    assert found.stored == [Stored(Tier.HBM, list(range(25)), 0), Stored(Tier.HBM, [7], 1)]
    (marker,) = engine.kv_event_publisher.batches
    assert (marker.ts, marker.events) == (found.written_s, ["an event"])
    assert not engine.impala_blocks._copies


async def test_what_cannot_be_answered_is_said(monkeypatch):
    site = Site()
    serve(site, scheduler([key(1), key(2)], is_on=False))
    status, _, body = await site.request("GET", "/impala/blocks")
    assert (status, "--kv-events-config" in json.loads(body)["error"]) == (409, True)
    engine = scheduler([key(1), key(2)])
    serve(site, engine)
    for _ in range(blocks.MAX_COPIES):
        assert (await site.request("GET", "/impala/blocks?limit=1"))[0] == 200
    assert (await site.request("GET", "/impala/blocks?limit=1"))[0] == 503
    token = next(iter(engine.impala_blocks._copies))
    assert (await site.request("GET", f"/impala/blocks?after={token}:1"))[0] == 200
    assert (await site.request("GET", f"/impala/blocks?after={token}:1"))[0] == 410
    monkeypatch.setattr(blocks, "KEPT_S", -1.0)
    assert (await site.request("GET", "/impala/blocks?limit=1"))[0] == 200
    assert (await site.request("GET", "/impala/blocks?rank=3"))[0] == 404
    for bad in ("limit=0", "limit=20001", "rank=x", "after=1", "of=traces"):
        assert (await site.request("GET", f"/impala/blocks?{bad}"))[0] == 400


async def test_a_snapshot_needs_the_key_that_the_server_needs():
    assert (await Site(api_keys=["secret"]).request("GET", "/impala/blocks"))[0] == 401

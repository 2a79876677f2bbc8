"""vLLM's own block pool and publisher on one side, our hashes, feed and index on the other: they must agree."""

import asyncio
import base64
import contextlib
import json
import random
from types import SimpleNamespace

import pytest
import zmq.asyncio

kv_events = pytest.importorskip("vllm.distributed.kv_events")

from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core import kv_cache_utils  # noqa: E402
from vllm.v1.core.block_pool import BlockPool  # noqa: E402
from vllm.v1.request import Request  # noqa: E402

from impala_vllm.adapters.vllm import snapshot  # noqa: E402
from impala_vllm.fleet.events import Endpoints, Feed, Follower, Removed, Stored  # noqa: E402
from impala_vllm.fleet.events.follower import Completeness  # noqa: E402
from impala_vllm.fleet.hashing import Scheme  # noqa: E402
from impala_vllm.fleet.hashing.scheme import function  # noqa: E402
from impala_vllm.fleet.index import MaskIndex  # noqa: E402
from impala_vllm.fleet.places import Replica, ServerId, Tier  # noqa: E402

BLOCK_TOKENS = 16
REPLICA = Replica(ServerId("http://s:1"))


class Into:
    """A sink that fills an index and wakes whoever waits."""

    def __init__(self) -> None:
        self.index = MaskIndex()
        self.changed = asyncio.Event()

    def apply(self, events) -> None:
        for event in events:
            if isinstance(event, Stored):
                self.index.store(REPLICA, event.tier, event.keys, 0.0)
            elif isinstance(event, Removed):
                self.index.remove(REPLICA, event.tier, event.keys)
            else:
                self.index.clear(REPLICA, Tier.HBM)
        self.changed.set()

    def lost(self) -> None:
        self.index.clear(REPLICA)


class Engine:
    """vLLM's pool with events, used as its KV cache manager uses it."""

    def __init__(self, folder, num_blocks: int, buffer_steps: int = 10_000) -> None:
        kv_cache_utils.init_none_hash(sha256)
        self.hasher = kv_cache_utils.get_request_block_hasher(BLOCK_TOKENS, sha256)
        self.pool = BlockPool(num_blocks, True, BLOCK_TOKENS, enable_kv_cache_events=True)
        self.endpoints = Endpoints(f"ipc://{folder}/e", f"ipc://{folder}/r")
        self.publisher = kv_events.ZmqEventPublisher(0, self.endpoints.events, self.endpoints.replay, buffer_steps)
        self.num_steps = 0
        self.scheduler = SimpleNamespace(
            kv_cache_manager=SimpleNamespace(block_pool=self.pool, take_events=self.pool.take_events),
            kv_event_publisher=self.publisher,
            get_kv_event_publisher_config=self.publisher.get_publisher_config,
        )

    def serve(self, tokens: list[int], salt: str | None = None) -> None:
        """Compute a prompt that shares nothing cached (as two that arrive together do), free it, publish."""
        params = SamplingParams(max_tokens=1)
        request = Request("r", tokens, params, None, cache_salt=salt, block_hasher=self.hasher)
        num_full = len(tokens) // BLOCK_TOKENS
        blocks = self.pool.get_new_blocks(num_full)
        self.pool.cache_full_blocks(request, blocks, 0, num_full, BLOCK_TOKENS, 0)
        self.pool.free_blocks(reversed(blocks))
        self.publish()

    def publish(self) -> None:
        self.num_steps += 1
        self.publisher.publish(kv_events.KVEventBatch(ts=float(self.num_steps), events=self.pool.take_events()))

    def num_cached(self, tokens: list[int], salt: str | None = None) -> int:
        """Leading blocks that the pool would hit."""
        params = SamplingParams(max_tokens=1)
        request = Request("q", tokens, params, None, cache_salt=salt, block_hasher=self.hasher)
        hits = 0
        for block_hash in request.block_hashes:
            if self.pool.get_cached_block(block_hash, [0]) is None:
                break
            hits += 1
        return hits


async def test_the_index_says_what_the_engine_would_hit(tmp_path):
    """Duplicates, evictions and a reset, over the real wire."""
    engine, sink, lot = Engine(tmp_path, 300), Into(), random.Random(5)
    scheme = Scheme("sha256", function("sha256")(kv_cache_utils.get_none_hash_seed()), BLOCK_TOKENS)
    follower = Follower(sink, can_replay=True)
    context = zmq.asyncio.Context()
    feed = asyncio.create_task(Feed(context, engine.endpoints, follower).run())
    stem = lot.choices(range(30_000), k=20 * BLOCK_TOKENS)
    prompts = [stem + lot.choices(range(30_000), k=BLOCK_TOKENS * lot.randrange(1, 60) + 5) for _ in range(25)]

    async def agree() -> None:
        async with asyncio.timeout(60):
            while follower.next_seq != engine.num_steps:
                sink.changed.clear()
                await sink.changed.wait()
        for tokens in prompts:
            for salt in (None, "tenant"):
                depths = sink.index.prefixes(scheme.chain(tokens, salt=salt).keys).get(REPLICA)
                assert (depths.hbm if depths is not None else 0) == engine.num_cached(tokens, salt)

    try:
        for number, tokens in enumerate([*prompts, *prompts[:5]]):
            engine.serve(tokens, "tenant" if number % 4 == 3 else None)
            await agree()
        assert sum(engine.num_cached(tokens) > 0 for tokens in prompts) > 3
        engine.pool.reset_prefix_cache()
        engine.publish()
        await agree()
        assert sink.index.stats().num_blocks == 0
        engine.serve(prompts[0])
        await agree()
        assert follower.counts.losses == 0
        assert sink.index.stats().num_unheld == 0
    finally:
        feed.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await feed
        context.term()
        engine.publisher.shutdown()


async def test_a_snapshot_of_the_pool_makes_a_late_router_whole(tmp_path):
    """Pages of seven blocks, with steps in between: what a replay no longer has comes from the engine itself."""
    engine, sink, lot = Engine(tmp_path, 300, buffer_steps=2), Into(), random.Random(6)
    scheme = Scheme("sha256", function("sha256")(kv_cache_utils.get_none_hash_seed()), BLOCK_TOKENS)
    prompts = [lot.choices(range(30_000), k=BLOCK_TOKENS * lot.randrange(3, 40)) for _ in range(12)]
    for tokens in prompts[:8]:
        engine.serve(tokens)
    pages = 0

    async def ask(after: str | None) -> bytes:
        nonlocal pages
        taken = snapshot.take(engine.scheduler, 0, {"of": "blocks", "rank": 0, "limit": 7, "after": after})["blocks"]
        if after is None:
            engine.num_steps += 1  # the batch that marks the moment
        elif pages < 4:
            engine.serve(prompts[8 + pages])
        pages += 1
        return json.dumps({**taken, "keys": base64.b64encode(taken["keys"]).decode()}).encode()

    follower = Follower(sink, can_replay=True)
    context = zmq.asyncio.Context()
    feed = asyncio.create_task(Feed(context, engine.endpoints, follower, ask).run())
    try:
        async with asyncio.timeout(100):
            while follower.completeness is not Completeness.HBM or follower.next_seq != engine.num_steps:
                sink.changed.clear()
                await sink.changed.wait()
        assert pages > 10
        for tokens in prompts:
            depths = sink.index.prefixes(scheme.chain(tokens).keys).get(REPLICA)
            assert (depths.hbm if depths is not None else 0) == engine.num_cached(tokens)
        assert sum(engine.num_cached(tokens) > 0 for tokens in prompts[:8]) > 2
        assert follower.counts.snapshots == 1
    finally:
        feed.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await feed
        context.term()
        engine.publisher.shutdown()

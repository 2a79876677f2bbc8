"""Feeds against vLLM's own publisher, over real sockets."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import zmq.asyncio

from impala_vllm.fleet.events import Endpoints, Event, Feed, Follower, feed
from impala_vllm.fleet.events.feed import EndpointError
from impala_vllm.fleet.events.follower import Completeness
from tests.fleet.cable import Cable
from tests.fleet.events.publishing import Copies

kv_events = pytest.importorskip("vllm.distributed.kv_events")


class Heard(Copies):
    """Copies that can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = asyncio.Event()

    def apply(self, events: list[Event]) -> None:
        super().apply(events)
        self._changed.set()

    def lost(self) -> None:
        super().lost()
        self._changed.set()

    async def until(self, holds: Callable[[Counter[int]], bool]) -> None:
        async with asyncio.timeout(60):
            while not holds(self.blocks):
                self._changed.clear()
                await self._changed.wait()


class Ipc:
    """A publisher of vLLM's on sockets that a second life can take again."""

    def __init__(self, folder: Path, **more: object) -> None:
        self.endpoints = Endpoints(f"ipc://{folder}/e", f"ipc://{folder}/r")
        self._more = more
        self.restart(first=True)

    def restart(self, first: bool = False) -> None:
        if not first:
            self.publisher.shutdown()
        self.num_sent = 0
        self.publisher = kv_events.ZmqEventPublisher(0, self.endpoints.events, self.endpoints.replay, **self._more)

    def publish(self, *events: object) -> None:
        self.num_sent += 1
        self.publisher.publish(kv_events.KVEventBatch(ts=asyncio.get_running_loop().time(), events=list(events)))


def stored(*blocks: int) -> object:
    return kv_events.BlockStored(
        block_hashes=[bytes(24) + block.to_bytes(8, "big") for block in blocks],
        parent_block_hash=None,
        token_ids=[],
        block_size=16,
        lora_id=None,
        medium="GPU",
        lora_name=None,
    )


def removed(*blocks: int) -> object:
    return kv_events.BlockRemoved(block_hashes=[bytes(24) + b.to_bytes(8, "big") for b in blocks], medium="GPU")


@contextlib.asynccontextmanager
async def following(endpoints: Endpoints, follower: Follower) -> AsyncIterator[None]:
    context = zmq.asyncio.Context()
    task = asyncio.create_task(Feed(context, endpoints, follower).run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        context.term()


async def known(follower: Follower, what: Completeness) -> None:
    async with asyncio.timeout(60):
        while follower.completeness is not what:
            await asyncio.sleep(0.01)


@pytest.fixture
def site(tmp_path):
    site = Ipc(tmp_path)
    yield site
    site.publisher.shutdown()


async def test_history_then_live_batches(site):
    sink = Heard()
    follower = Follower(sink, can_replay=True)
    site.publish(stored(1, 2, 3))
    site.publish(removed(2))
    async with following(site.endpoints, follower):
        await sink.until(lambda blocks: set(blocks) == {1, 3})
        site.publish(stored(4))
        await sink.until(lambda blocks: set(blocks) == {1, 3, 4})
        await known(follower, Completeness.ALL)
    assert sink.num_lost == 0


async def test_over_tcp(monkeypatch):
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    publisher = kv_events.ZmqEventPublisher(0, "tcp://*:0", "tcp://*:0", topic="kv")
    try:
        config = publisher.get_publisher_config()
        sink = Heard()
        publisher.publish(kv_events.KVEventBatch(ts=1.0, events=[stored(1)]))
        endpoints = Endpoints(config.endpoint, config.replay_endpoint, "kv")
        async with following(endpoints, Follower(sink, can_replay=True)):
            await sink.until(lambda blocks: set(blocks) == {1})
            publisher.publish(kv_events.KVEventBatch(ts=2.0, events=[stored(2)]))
            await sink.until(lambda blocks: set(blocks) == {1, 2})
    finally:
        publisher.shutdown()


async def test_what_was_missed_between_two_subscriptions_is_replayed(site):
    sink = Heard()
    follower = Follower(sink, can_replay=True)
    site.publish(stored(1))
    async with following(site.endpoints, follower):
        await sink.until(lambda blocks: 1 in blocks)
    site.publish(removed(1))
    site.publish(stored(2))
    async with following(site.endpoints, follower):
        while 3 not in sink.blocks:  # the first ones may come before the subscription has reached the publisher
            site.publish(stored(3))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await sink.until(lambda blocks: 3 in blocks)
        await known(follower, Completeness.ALL)
    assert set(sink.blocks) == {2, 3}
    assert sink.num_lost == 0


async def test_a_restarted_engine_starts_with_nothing(site):
    sink = Heard()
    follower = Follower(sink, can_replay=True)
    site.publish(stored(1, 2, 3))
    site.publish(stored(4))
    async with following(site.endpoints, follower):
        await sink.until(lambda blocks: 4 in blocks)
        await asyncio.to_thread(site.restart)
        while 9 not in sink.blocks:
            site.publish(stored(9))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await sink.until(lambda blocks: 9 in blocks)
    assert set(sink.blocks) == {9}
    assert follower.counts.epochs == 1


async def test_a_publisher_that_goes_away_leaves_what_is_known_unsure_and_soon_nothing(site, monkeypatch):
    sink = Heard()
    follower = Follower(sink, can_replay=True)
    site.publish(stored(1, 2))
    async with following(site.endpoints, follower):
        await sink.until(lambda blocks: set(blocks) == {1, 2})
        await known(follower, Completeness.ALL)
        await asyncio.to_thread(site.publisher.shutdown)
        await known(follower, Completeness.UNSURE)
        assert set(sink.blocks) == {1, 2}
        monkeypatch.setattr(feed, "UNSURE_S", 0.0)
        await known(follower, Completeness.NOTHING)
        assert not sink.blocks
        await asyncio.to_thread(site.restart, first=True)
        site.publish(stored(9))
        await known(follower, Completeness.ALL)
    assert set(sink.blocks) == {9}


async def test_a_connection_that_goes_silent_makes_what_is_known_unsure_until_it_was_replayed(site):
    """Only what carries live events is cut, and nobody is told; the replay's socket answers all the time."""
    sink = Heard()
    follower = Follower(sink, can_replay=True)
    site.publish(stored(1, 2))
    async with Cable(Path(site.endpoints.events.removeprefix("ipc://"))) as cable:
        through = Endpoints(f"tcp://127.0.0.1:{cable.port}", site.endpoints.replay)
        async with following(through, follower):
            await known(follower, Completeness.ALL)
            cable.cut()
            site.publish(removed(1))
            await known(follower, Completeness.UNSURE)
            cable.mend(forgets=True)
            await known(follower, Completeness.ALL)
            assert set(sink.blocks) == {2}
    assert sink.num_lost == 0


async def test_what_only_a_replay_told_is_unsure(site):
    """Its live events have never come: nothing listens there."""
    follower = Follower(Heard(), can_replay=True)
    site.publish(stored(1))
    async with following(Endpoints("tcp://127.0.0.1:1", site.endpoints.replay), follower):
        await known(follower, Completeness.UNSURE)


async def test_a_long_history_comes_whole_or_is_known_not_to(site):
    """The publisher's replay socket drops what does not fit, without a word: 4,000 batches are more than it holds."""
    for block in range(4000):
        site.publish(stored(block))
    sink = Heard()
    follower = Follower(sink, can_replay=True)
    async with following(site.endpoints, follower):
        await sink.until(lambda blocks: len(blocks) == 4000)
        await known(follower, Completeness.ALL)
    assert sink.num_lost == 0


@pytest.mark.parametrize(
    "bad", ["", "tcp://", "tcp://*:5557", "tcp://host", "tcp://host:port", "tcp://h:99999", "h:5557"]
)
def test_what_is_no_endpoint_is_refused_in_one_line(bad):
    with pytest.raises(EndpointError, match="write tcp://HOST:PORT"):
        Endpoints(bad)


def test_ranks_publish_where_vllm_puts_them():
    endpoints = Endpoints("tcp://10.0.0.1:5557", "tcp://10.0.0.1:6557")
    for rank in (0, 1, 3):
        found = endpoints.of_rank(rank)
        offset = kv_events.ZmqEventPublisher.offset_endpoint_port
        assert (found.events, found.replay) == (offset(endpoints.events, rank), offset(endpoints.replay, rank))

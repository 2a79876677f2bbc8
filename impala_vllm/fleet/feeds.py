"""What follows one server's KV events: a feed for each of its ranks, started as its handshake says.

Owns their tasks. Whatever keeps a rank from being followed is said once, in words.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from urllib.parse import urlsplit

import zmq.asyncio

from impala_vllm.fleet.addresses import Address
from impala_vllm.fleet.events import Endpoints, Feed, Follower
from impala_vllm.fleet.events.feed import EndpointError
from impala_vllm.fleet.hashing import Hello, handshake
from impala_vllm.fleet.index import Index
from impala_vllm.fleet.into import Into
from impala_vllm.fleet.places import Replica

logger = logging.getLogger("impala.fleet")

AskBlocks = Callable[[int, str | None], Awaitable[bytes]]
"""Of a rank, a page of a snapshot; see `events.snapshot`."""


class Feeds:
    """One server's."""

    def __init__(self, address: Address, index: Index, context: zmq.asyncio.Context, ask_blocks: AskBlocks) -> None:
        self.address = address
        """Counts from the next `start` on."""
        self._index = index
        self._context = context
        self._ask_blocks = ask_blocks
        self._tasks: list[asyncio.Task[None]] = []
        self.followers: dict[Replica, Follower] = {}
        self.problem: str | None = "not asked yet"
        """Why its events are not followed; None: they are."""

    def start(self, hello: Hello, is_believed: bool) -> None:
        """Those before must be closed. Without belief in its hashes none is started."""
        problems: list[str] = []
        for rank in hello.ranks:
            endpoints = self._endpoints(rank)
            if endpoints is None:
                problems.append("its events are off; start it with --kv-events-config")
                continue
            if not is_believed:
                problems.append("not followed, since its hashes are not used")
                continue
            if endpoints.replay is None:
                problems.append("it has no replay endpoint, so a lost event costs all that is known of it")
            self._start(Replica(self.address.url, rank.dp_rank), endpoints, handshake.group_of(hello))
        self.problem = problems[0] if problems else None
        if self.problem is not None:
            logger.warning("%s: %s", self.address.url, self.problem)

    def have_failed(self) -> bool:
        """Whether one has ended: a feed runs until it is cancelled. It is said why."""
        failed = [task for task in self._tasks if task.done() and not task.cancelled()]
        for task in failed:
            logger.error(
                "%s: following its events failed; reading them anew", self.address.url, exc_info=task.exception()
            )
        return bool(failed)

    async def close(self) -> None:
        """End them. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self.followers.clear()

    def _start(self, replica: Replica, endpoints: Endpoints, group: int) -> None:
        follower = Follower(Into(self._index, replica, group), can_replay=endpoints.replay is not None)
        self.followers[replica] = follower
        feed = Feed(self._context, endpoints, follower, partial(self._ask_blocks, replica.dp_rank))
        self._tasks.append(asyncio.create_task(feed.run(), name=f"events of {replica.server}"))

    def _endpoints(self, rank: handshake.Rank) -> Endpoints | None:
        if self.address.events is not None:
            return self.address.events.of_rank(rank.dp_rank)
        if rank.events is None:
            return None
        host = urlsplit(self.address.url).hostname or "127.0.0.1"
        try:
            replay = rank.events.replay_endpoint
            return Endpoints(
                _reachable(rank.events.endpoint, host), replay and _reachable(replay, host), rank.events.topic
            )
        except EndpointError as e:
            logger.warning("%s: %s", self.address.url, e)
            return None


def _reachable(endpoint: str, host: str) -> str:
    """An endpoint as it was bound, from elsewhere."""
    for wildcard in ("*", "0.0.0.0", "[::]"):
        endpoint = endpoint.replace(f"tcp://{wildcard}:", f"tcp://{host}:")
    return endpoint

"""The sockets behind one follower: a subscription, and a replay where the follower asks for one.

One asyncio task a replica, started and ended by `run`, and one more while it reads a snapshot. Batches that arrive
during a replay wait in the subscription's own queue. No byte is read here that the follower does not take before the
next one.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils import monitor

from impala_vllm.fleet.events import snapshot
from impala_vllm.fleet.events.follower import Follower
from impala_vllm.fleet.events.snapshot import Snapshot, SnapshotError

logger = logging.getLogger("impala.fleet")

REPLAY_TIMEOUT_S = 2.0
"""Longest silence within a replay. The publisher looks for questions ten times a second."""
SNAPSHOT_AGAIN_S = 5.0
"""Between two attempts to get a snapshot, and for the batch that marks its moment to arrive."""
SILENT_MS = 2000
"""Without an answer to a heartbeat for so long a connection is given up: a cut network leaves it half open."""
CONNECT_MS = 1000
"""For a new one to stand; so long after the network is back it does at the latest."""
UNSURE_S = 10.0
"""Without a connection for so long, nothing that was heard is believed any more: a busy engine has turned over much of
its HBM by then. As long as what other routers told is, see `registry`."""
LOOK_S = 0.25
"""Between two looks for a new connection while nothing comes: what was missed is asked for then, not with the next
batch, which an idle engine may not send for hours."""
BATCHES_A_TURN = 64
"""Batches taken before others of the event loop get their turn."""
MAX_BATCH_BYTES = 64 << 20
"""A step of 8,192 tokens is some 50 KB."""
_END = (-1).to_bytes(8, "big", signed=True)


class EndpointError(ValueError):
    """Not an endpoint, in one line."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a server publishes."""

    events: str
    """As `tcp://host:5557`; rank r of a data-parallel server is at the port + r."""
    replay: str | None = None
    topic: str = ""

    def __post_init__(self) -> None:
        for endpoint in (self.events, self.replay):
            scheme, separator, address = ("ipc://-" if endpoint is None else endpoint).partition("://")
            host, _, port = address.rpartition(":")
            is_tcp = scheme == "tcp" and host not in ("", "*") and port.isdecimal() and int(port) < 1 << 16
            if not separator or not (is_tcp or (scheme in ("ipc", "inproc") and address)):
                raise EndpointError(f"{endpoint}: not an endpoint to connect to; write tcp://HOST:PORT")

    def of_rank(self, rank: int) -> "Endpoints":
        """Where that rank publishes, by vLLM's own rule."""
        return Endpoints(_offset(self.events, rank), self.replay and _offset(self.replay, rank), self.topic)


class Feed:
    """Follows one replica as long as `run` runs."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        endpoints: Endpoints,
        follower: Follower,
        ask_blocks: Callable[[str | None], Awaitable[bytes]] | None = None,
    ) -> None:
        """`ask_blocks`: a page of a snapshot, see `snapshot.read`; without it what is lost stays lost."""
        self._ask_blocks = ask_blocks
        self._asking: asyncio.Task[None] | None = None
        self._parted_s: float | None = None
        """Since when there is no connection."""
        self._context = context
        self._endpoints = endpoints
        self._follower = follower

    async def run(self) -> None:
        """Never returns; cancel it. The subscription is made before anything is awaited."""
        try:
            await self._run()
        finally:
            if self._asking is not None:
                self._asking.cancel()
                await asyncio.gather(self._asking, return_exceptions=True)

    async def _run(self) -> None:
        with self._context.socket(zmq.SUB) as subscription, _watch(self._context) as watch:
            subscription.linger = 0
            subscription.rcvhwm = 100_000  # as many as vLLM's publisher keeps
            subscription.maxmsgsize = MAX_BATCH_BYTES
            subscription.heartbeat_ivl = SILENT_MS // 4
            subscription.heartbeat_timeout = SILENT_MS
            subscription.connect_timeout = subscription.handshake_ivl = CONNECT_MS
            subscription.subscribe(self._endpoints.topic)
            watched = f"inproc://impala-{id(subscription)}"
            subscription.monitor(watched, zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
            watch.connect(watched)
            subscription.connect(self._endpoints.events)
            self._part()
            num_taken = 0
            while True:
                await self._settle()
                self._make_whole()
                coming = asyncio.ensure_future(subscription.recv_multipart())
                while True:
                    if self._follower.has_work:
                        self._follower.work()
                        await asyncio.sleep(0)
                    elif not coming.done():
                        await asyncio.wait((coming,), timeout=LOOK_S)
                    # The watch's notice was queued before anything that came over the next connection.
                    while watch.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                        if monitor.parse_monitor_message(watch.recv_multipart())["event"] == zmq.EVENT_DISCONNECTED:
                            self._part()
                        else:
                            self._parted_s = None
                            self._follower.reconnected()  # the first one too: replays were faster, perhaps
                    self._forget()
                    if self._follower.question is not None:
                        await self._settle()
                    if coming.done():
                        break
                    self._make_whole()
                frames = coming.result()
                if len(frames) == 3 and len(frames[1]) == 8:
                    self._follower.live(int.from_bytes(frames[1], "big"), frames[2])
                num_taken += 1
                if num_taken % BATCHES_A_TURN == 0:
                    await asyncio.sleep(0)

    def _part(self) -> None:
        """There is no connection: the server may well answer requests, and change what it holds unheard."""
        if self._parted_s is None:  # an attempt that fails half-way is told as well
            self._parted_s = asyncio.get_running_loop().time()
        self._follower.disconnected()

    def _forget(self) -> None:
        """What was known, once that has lasted."""
        is_over = self._parted_s is not None and asyncio.get_running_loop().time() - self._parted_s >= UNSURE_S
        if is_over and self._follower.knows:
            logger.warning("%s: no connection; what it told before is forgotten", self._endpoints.events)
            self._follower.forget()

    def _make_whole(self) -> None:
        """Read a snapshot beside the stream, where one is wanted."""
        is_asking = self._asking is not None and not self._asking.done()
        if self._ask_blocks is not None and self._follower.wants_snapshot and not is_asking:
            self._asking = asyncio.create_task(self._read_snapshots(self._ask_blocks), name="snapshot")

    async def _read_snapshots(self, ask: Callable[[str | None], Awaitable[bytes]]) -> None:
        while self._follower.wants_snapshot:
            self._follower.snapshot_begins()
            try:
                found: Snapshot = await snapshot.read(ask)
            except SnapshotError as e:
                logger.warning("%s: no snapshot (%s)", self._endpoints.events, e)
                self._follower.snapshot_failed()
            else:
                self._follower.snapshot_came(found)
            until_s = asyncio.get_running_loop().time() + SNAPSHOT_AGAIN_S
            while asyncio.get_running_loop().time() < until_s and self._follower.is_incomplete:
                await asyncio.sleep(0.1)
            self._follower.snapshot_failed()

    async def _settle(self) -> None:
        """Ask until nothing is left to ask."""
        while self._follower.question is not None:
            await self._replay()

    async def _replay(self) -> None:
        assert self._endpoints.replay is not None
        question = self._follower.asked()
        # A socket each time: what is late from the last one cannot be taken for an answer to this one.
        dealer: Any = self._context.socket(zmq.DEALER)
        with dealer:
            dealer.linger = 0
            dealer.rcvhwm = 0
            dealer.maxmsgsize = MAX_BATCH_BYTES
            dealer.connect(self._endpoints.replay)
            await dealer.send_multipart((b"", question.from_seq.to_bytes(8, "big")))
            num_taken = 0
            while await dealer.poll(int(REPLAY_TIMEOUT_S * 1000)):
                frames = await dealer.recv_multipart()
                if len(frames) != 4 or len(frames[2]) != 8:
                    continue
                if frames[2] == _END:
                    self._follower.replay_ended()
                    return
                self._follower.replayed(int.from_bytes(frames[2], "big"), frames[3])
                num_taken += 1
                if num_taken % BATCHES_A_TURN == 0:
                    await asyncio.sleep(0)
        logger.warning("%s does not answer a replay; its history is incomplete", self._endpoints.replay)
        self._follower.replay_failed()


def _watch(context: zmq.asyncio.Context) -> Any:
    """A socket that is read without waiting."""
    plain: Any = zmq.Context
    return plain.shadow(context).socket(zmq.PAIR)


def _offset(endpoint: str, rank: int) -> str:
    if rank == 0:
        return endpoint
    if endpoint.startswith("inproc://"):
        return f"{endpoint}_dp{rank}"
    base, colon, port = endpoint.rpartition(":")
    return f"{base}:{int(port) + rank}" if endpoint.startswith("tcp://") and colon else endpoint

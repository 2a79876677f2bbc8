"""One vLLM server of the fleet: is it up, what does it serve, how does it hash, where does it publish.

Owns the tasks that ask it and the feeds that follow it. Whatever is wrong with its hashes or events is said once, in
words, and shown at /v1/impala/servers: such a server is still used, by load and by where traces were sent before.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import msgspec
import zmq.asyncio

from impala_vllm.fleet import faults
from impala_vllm.fleet.events import Endpoints, Feed, Follower
from impala_vllm.fleet.events.feed import EndpointError
from impala_vllm.fleet.events.follower import Completeness
from impala_vllm.fleet.events.snapshot import SnapshotError
from impala_vllm.fleet.hashing import Adapter, Hello, HelloError, handshake
from impala_vllm.fleet.index import Index
from impala_vllm.fleet.into import Into
from impala_vllm.fleet.places import Replica, ServerId

logger = logging.getLogger("impala.fleet")

BLOCKS_A_PAGE = 10_000
"""Of a snapshot: half a millisecond of the engine loop, 160 KB."""


@dataclass(frozen=True, slots=True)
class AskingConfig:
    """How servers are asked."""

    every_s: float = 2.0
    """Between two looks at /health."""
    details_every_s: float = 15.0
    """Between two handshakes; a restarted engine is found by it at the latest."""
    within_s: float = 5.0
    down_every_s: float = 0.5
    """Between two looks at one that is down. With `reach_s` well under 2 s: so soon after the network is back all that
    it holds is to be known again."""
    reach_s: float = 0.75
    """For a connection to one that is down. A connection asked for just before the network was back stands later."""
    failures: int = 3
    """Looks in vain, in a row, after which a server is down."""


class State(Enum):
    """Of a server."""

    NEW = "new"
    UP = "up"
    DOWN = "down"
    DRAINING = "draining"
    """Gets no new requests; goes when those that run have ended."""


class Address(NamedTuple):
    """Where a server is."""

    url: ServerId
    events: Endpoints | None = None
    """Where it publishes; None: as its handshake says."""


class Hooks(NamedTuple):
    """What a server tells the fleet."""

    on_hello: Callable[["Server", Hello], str | None]
    """A handshake came; answers what is wrong with it, None where its hashes are believed."""
    on_change: Callable[["Server"], None]
    """State, ranks or models changed."""
    on_lost: Callable[[Replica], None]
    """The replica's KV is gone."""


class Server:
    """Created, then `run` as a task; `close` cancels what it started."""

    def __init__(
        self,
        address: Address,
        index: Index,
        session: aiohttp.ClientSession,
        context: zmq.asyncio.Context,
        headers: Mapping[str, str],
        hooks: Hooks,
        config: AskingConfig,
    ) -> None:
        self.address = address
        self.id = address.url
        self.state = State.NEW
        self.hello: Hello | None = None
        self.problem: str | None = "not asked yet"
        """Why its hashes are not used; None: they are."""
        self.chat_problem: str | None = None
        """Why the hashes of chats, at least, match nothing that it publishes."""
        self.event_problem: str | None = "not asked yet"
        """Why its events are not followed; None: they are."""
        self.models: dict[str, Adapter | None] | None = None
        """Served names; None: unknown, any may be."""
        self.replicas: list[Replica] = [Replica(self.id)]
        self.followers: dict[Replica, Follower] = {}
        self.model_cards: list[dict[str, Any]] = []
        self._index = index
        self._session = session
        self._context = context
        self._headers = headers
        self._hooks = hooks
        self._config = config
        self._feeds: list[asyncio.Task[None]] = []
        self._following: tuple[list[handshake.Rank], bool] | None = None
        """What the feeds were started for: its ranks, and whether its hashes were believed."""
        self._flights: set[asyncio.Timeout] = set()
        """Requests under way."""
        self._is_well = False
        """Its last look was answered."""
        self._num_failures = 0
        self._is_forgotten = False
        """What it holds was dropped while it did not answer: its events must be read from their beginning."""
        self._details_at_s = 0.0

    async def run(self) -> None:
        """Ask again and again; cancel it."""
        while True:
            try:
                await self.ask()
            except Exception:  # the next look tries again; a fleet must not lose a server to one odd answer
                logger.exception("%s: asking it failed", self.id)
            is_down = self.state is State.DOWN
            await asyncio.sleep(min(self._config.every_s, self._config.down_every_s if is_down else math.inf))

    async def ask(self) -> None:
        """One look."""
        now_s = asyncio.get_running_loop().time()
        is_silent = False
        try:
            status, _ = await self._get("/health")
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            if faults.is_own(e):
                logger.error("%s could not be asked: %s", self.id, e)
                return
            status, is_silent = 0, faults.is_silence(e)
        self._is_well = status == 200
        if not self._is_well:
            self._num_failures += 1
            if self._num_failures >= self._config.failures or self.state is State.NEW:
                self.suspect()
                if is_silent:  # when a process ends, its connections do too
                    self._give_up_requests()
            return
        self._num_failures = 0
        self._look_after_feeds(now_s)
        is_back = self.state in (State.NEW, State.DOWN)
        if is_back or now_s >= self._details_at_s:
            self._details_at_s = now_s + self._config.details_every_s
            await self._ask_details()
        if is_back:
            self._become(State.UP)

    def suspect(self) -> None:
        """It does not answer: nothing goes there until it does again, and what it held is not counted on."""
        if self.state in (State.DOWN, State.DRAINING):
            return
        self._become(State.DOWN)
        self._is_forgotten = True
        for replica in self.replicas:
            self._hooks.on_lost(replica)

    @contextlib.asynccontextmanager
    async def flight(self) -> AsyncGenerator[None, None]:
        """Around a request to it. Raises TimeoutError inside once the server is down and says nothing at all."""
        async with asyncio.timeout(None) as flight:
            self._flights.add(flight)
            try:
                yield
            finally:
                self._flights.discard(flight)

    def drain(self) -> None:
        """No new requests from now on."""
        self._become(State.DRAINING)

    def stay(self) -> None:
        """It is wanted again, where it was being drained."""
        if self.state is State.DRAINING:
            self._become(State.UP if self._is_well else State.NEW)

    async def close(self) -> None:
        """End the feeds. Idempotent."""
        for feed in self._feeds:
            feed.cancel()
        await asyncio.gather(*self._feeds, return_exceptions=True)
        self._feeds.clear()
        self.followers.clear()

    def has_events(self, replica: Replica) -> bool:
        """Whether what the replica holds is told by it, under keys that prompts have here."""
        follower = self.followers.get(replica)
        is_told = follower is not None and follower.completeness is not Completeness.NOTHING
        return is_told and self.problem is None and self.chat_problem is None

    def judge_chats(self, ours: str | None, hello: Hello | None = None) -> None:
        """Compare how it renders chats, by its handshake, with how they are rendered here; None: not known yet."""
        found = hello or self.hello
        theirs = found.chats if found is not None else None
        problem = _OTHER_CHATS if None not in (ours, theirs) and ours != theirs else None
        if problem != self.chat_problem:
            self.chat_problem = problem
            level = logging.INFO if problem is None else logging.WARNING
            logger.log(level, "%s: %s", self.id, problem or "chats match")

    def _become(self, state: State) -> None:
        if state is self.state:
            return
        logger.info("%s: %s", self.id, state.value)
        self.state = state
        self._hooks.on_change(self)

    async def _ask_details(self) -> None:
        try:
            status, body = await self._get("/impala/hello")
        except (aiohttp.ClientError, TimeoutError, OSError):
            return  # the next look at /health says what is the matter
        problem, hello = self.problem, None
        if status == 200:
            try:
                hello = handshake.read(body)
                problem = self._hooks.on_hello(self, hello)
            except HelloError as e:
                problem = str(e)
        elif status in (401, 403):
            problem = "it wants an API key for its handshake; give the router --server-key"
        elif status == 404:
            problem = "it has no handshake; start it with --scheduler impala, in mode observe at least"
        if problem != self.problem:
            self.problem = problem
            logger.log(
                logging.INFO if problem is None else logging.WARNING, "%s: %s", self.id, problem or "hashes match"
            )
        await self._ask_models()
        if hello is not None:
            await self._follow(hello)
        self._hooks.on_change(self)

    async def _ask_models(self) -> None:
        try:
            status, body = await self._get("/v1/models")
            if status != 200:
                return
            cards = msgspec.json.decode(body, type=_Models).data
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError):
            return
        self.model_cards = cards
        self.models = {str(card.get("id")): _adapter(card) for card in cards}

    def _give_up_requests(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for flight in self._flights:
            flight.reschedule(now_s)
        self._flights.clear()

    def _look_after_feeds(self, now_s: float) -> None:
        """A feed runs until it is cancelled: one that has ended otherwise is started again."""
        failed = [feed for feed in self._feeds if feed.done() and not feed.cancelled()]
        for feed in failed:
            logger.error("%s: following its events failed; reading them anew", self.id, exc_info=feed.exception())
        if failed:
            self._is_forgotten = True
            self._details_at_s = now_s

    async def _follow(self, hello: Hello) -> None:
        """Start the feeds that the handshake asks for, where it or what is thought of it is another than before."""
        before, self.hello = self._following, hello
        wanted = (hello.ranks, self.problem is None)
        if before == wanted and not self._is_forgotten:
            return
        epochs = [rank.epoch for rank in hello.ranks]
        if before is not None and (
            self._is_forgotten or [rank.epoch for rank in before[0]] != epochs or before[1] > wanted[1]
        ):
            for replica in self.replicas:
                self._hooks.on_lost(replica)
        self._following = wanted
        self._is_forgotten = False
        await self.close()
        self.replicas = [Replica(self.id, rank.dp_rank) for rank in hello.ranks]
        problems: list[str] = []
        for rank in hello.ranks:
            endpoints = self._endpoints(rank)
            if endpoints is None:
                problems.append("its events are off; start it with --kv-events-config")
                continue
            if self.problem is not None:
                problems.append("not followed, since its hashes are not used")
                continue
            if endpoints.replay is None:
                problems.append("it has no replay endpoint, so a lost event costs all that is known of it")
            self._start_feed(Replica(self.id, rank.dp_rank), endpoints, handshake.group_of(hello))
        self.event_problem = problems[0] if problems else None
        if self.event_problem is not None:
            logger.warning("%s: %s", self.id, self.event_problem)

    def _endpoints(self, rank: handshake.Rank) -> Endpoints | None:
        if self.address.events is not None:
            return self.address.events.of_rank(rank.dp_rank)
        if rank.events is None:
            return None
        host = urlsplit(self.id).hostname or "127.0.0.1"
        try:
            replay = rank.events.replay_endpoint
            return Endpoints(
                _reachable(rank.events.endpoint, host), replay and _reachable(replay, host), rank.events.topic
            )
        except EndpointError as e:
            logger.warning("%s: %s", self.id, e)
            return None

    def _start_feed(self, replica: Replica, endpoints: Endpoints, group: int) -> None:
        follower = Follower(Into(self._index, replica, group), can_replay=endpoints.replay is not None)
        self.followers[replica] = follower
        feed = Feed(self._context, endpoints, follower, partial(self._ask_blocks, replica.dp_rank))
        self._feeds.append(asyncio.create_task(feed.run(), name=f"events of {replica.server}"))

    async def _ask_blocks(self, dp_rank: int, after: str | None) -> bytes:
        """A page of a snapshot. Raises SnapshotError."""
        more = f"&after={after}" if after is not None else ""
        try:
            status, body = await self._get(f"/impala/blocks?rank={dp_rank}&limit={BLOCKS_A_PAGE}{more}")
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise SnapshotError(type(e).__name__) from e
        if status != 200:
            raise SnapshotError(f"status {status}")
        return body

    async def _get(self, path: str) -> tuple[int, bytes]:
        reach_s = self._config.reach_s if self.state is State.DOWN else None
        timeout = aiohttp.ClientTimeout(total=self._config.within_s, sock_connect=reach_s)
        async with self._session.get(self.id + path, headers=self._headers, timeout=timeout) as response:
            return response.status, await response.read()


_OTHER_CHATS = (
    "it renders chats otherwise than its tokenizer's template does (--chat-template and its like), so their hashes "
    "cannot match and only what was sent there is known; give the router --tokenizer DIR with the same template in it"
)


class _Models(msgspec.Struct):
    data: list[dict[str, Any]]


def _reachable(endpoint: str, host: str) -> str:
    """An endpoint as it was bound, from elsewhere."""
    for wildcard in ("*", "0.0.0.0", "[::]"):
        endpoint = endpoint.replace(f"tcp://{wildcard}:", f"tcp://{host}:")
    return endpoint


def _adapter(card: Mapping[str, Any]) -> Adapter | None:
    """LoRA adapters have a parent; their root is the path."""
    if not card.get("parent"):
        return None
    return Adapter(str(card.get("id")), str(card.get("root")))

"""One vLLM server of the fleet: is it up, what does it serve, how does it hash.

Keeps the feeds that follow it in step with what it answers. Whatever is wrong with its hashes or events is said once,
in words, and shown at /v1/impala/servers: such a server is still used, by load and by where traces were sent before.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple

import aiohttp
import zmq.asyncio

from impala_vllm.fleet import faults
from impala_vllm.fleet.addresses import Address
from impala_vllm.fleet.asking import Asking, AskingConfig
from impala_vllm.fleet.events import Endpoints
from impala_vllm.fleet.events.follower import Completeness
from impala_vllm.fleet.feeds import Feeds
from impala_vllm.fleet.flights import Flights
from impala_vllm.fleet.hashing import Adapter, Hello, HelloError, handshake
from impala_vllm.fleet.index import Index
from impala_vllm.fleet.pace import Pace
from impala_vllm.fleet.places import Replica

logger = logging.getLogger("impala.fleet")


class State(Enum):
    """Of a server."""

    NEW = "new"
    UP = "up"
    DOWN = "down"
    DRAINING = "draining"
    """Gets no new requests; goes when those that run have ended."""


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
        pace: Pace,
    ) -> None:
        self.address = address
        self.id = address.url
        self.state = State.NEW
        self.hello: Hello | None = None
        self.problem: str | None = "not asked yet"
        """Why its hashes are not used; None: they are."""
        self.chat_problem: str | None = None
        """Why the hashes of chats, at least, match nothing that it publishes."""
        self.models: dict[str, Adapter | None] | None = None
        """Served names; None: unknown, any may be."""
        self.replicas: list[Replica] = [Replica(self.id)]
        self.asking = Asking(address.url, session, headers, config)
        self.feeds = Feeds(address, index, context, self.asking.blocks)
        self.model_cards: list[dict[str, Any]] = []
        self._hooks = hooks
        self._config = config
        self._pace = pace
        self._following: tuple[list[handshake.Rank], bool] | None = None
        """What the feeds were started for: its ranks, and whether its hashes were believed."""
        self._flights = Flights(config.silence_s)
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
            await asyncio.sleep(self._pace.pause_s(self.state is State.DOWN))

    async def ask(self) -> None:
        """One look."""
        loop = asyncio.get_running_loop()
        now_s, is_silent = loop.time(), False
        self.asking.look(self.state is State.DOWN, self._num_failures)
        try:
            status, _ = await self.asking.get("/health")
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            if faults.is_own(e):
                self._pace.is_short(e, now_s)
                return
            status, is_silent = 0, faults.is_silence(e)
        is_lost = is_silent and self._flights.silent(now_s, loop.time())
        if not is_silent:
            self._flights.heard()
        self._is_well = status == 200
        if not self._is_well:
            self._num_failures += 1
            if self._num_failures >= self._config.failures or self.state is State.NEW:
                self.suspect()
                if is_lost:
                    self._flights.give_up()
            return
        self._num_failures = 0
        if self.feeds.have_failed():
            self._is_forgotten = True
            self._details_at_s = now_s
        is_back = self.state in (State.NEW, State.DOWN)
        if is_back or now_s >= self._details_at_s:
            self._details_at_s = now_s + self._config.details_every_s
            if not await self._ask_details():
                self._details_at_s = now_s
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

    def flight(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Around a request to it. Raises TimeoutError inside once the server is down and has long said nothing."""
        return self._flights.one()

    def drain(self) -> None:
        """No new requests from now on."""
        self._become(State.DRAINING)

    def stay(self) -> None:
        """It is wanted again, where it was being drained."""
        if self.state is State.DRAINING:
            self._become(State.UP if self._is_well else State.NEW)

    def publishes(self, events: Endpoints | None) -> None:
        """Where it publishes; None: as its handshake says.

        What is new counts from the next look on, and what was known by other events goes then.
        """
        if events == self.address.events:
            return
        logger.info("%s: its events are read %s from now on", self.id, events.events if events else "as it says itself")
        self.address = self.feeds.address = self.address._replace(events=events)
        self._is_forgotten = True
        self._details_at_s = 0.0

    async def close(self) -> None:
        """End the feeds. Idempotent."""
        await self.feeds.close()

    def knows(self, replica: Replica) -> bool:
        """Whether what the replica said of what it holds is believed, under keys that prompts have here."""
        follower = self.feeds.followers.get(replica)
        is_told = follower is not None and follower.knows
        return is_told and self.problem is None and self.chat_problem is None

    def has_events(self, replica: Replica) -> bool:
        """Whether the replica also tells of what it is sent now."""
        return self.knows(replica) and self.feeds.followers[replica].completeness is not Completeness.UNSURE

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
        self._pace.num_down += (state is State.DOWN) - (self.state is State.DOWN)
        self.state = state
        self.asking.hurries = state is State.DOWN
        self._hooks.on_change(self)

    async def _ask_details(self) -> bool:
        """False: it gave no answer, and is to be asked again at the next look, which says what is the matter."""
        try:
            status, body = await self.asking.get("/impala/hello")
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False
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
        if (cards := await self.asking.models()) is not None:
            self.model_cards = cards
            self.models = {str(card.get("id")): _adapter(card) for card in cards}
        if hello is not None:
            await self._follow(hello)
        self._hooks.on_change(self)
        return status < 500

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
        await self.feeds.close()
        self.replicas = [Replica(self.id, rank.dp_rank) for rank in hello.ranks]
        self.feeds.start(hello, self.problem is None)


_OTHER_CHATS = (
    "it renders chats otherwise than its tokenizer's template does (--chat-template and its like), so their hashes "
    "cannot match and only what was sent there is known; give the router --tokenizer DIR with the same template in it"
)


def _adapter(card: Mapping[str, Any]) -> Adapter | None:
    """LoRA adapters have a parent; their root is the path."""
    if not card.get("parent"):
        return None
    return Adapter(str(card.get("id")), str(card.get("root")))

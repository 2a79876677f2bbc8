"""All servers: added and removed while requests run, grouped by what they serve.

The first server whose handshake holds decides how a model's prompts are hashed; others of the same model must hash
the same or are routed by load. One event loop; the tokenizer is loaded in a thread.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import aiohttp
import zmq.asyncio

from impala_vllm.fleet.connection import open_socket
from impala_vllm.fleet.events import Endpoints
from impala_vllm.fleet.events.feed import EndpointError
from impala_vllm.fleet.hashing import Adapter, Hello, Prompts, Scheme, Tokenizer, TokenizerError, handshake
from impala_vllm.fleet.index import Index
from impala_vllm.fleet.places import Replica, ServerId
from impala_vllm.fleet.registry import layout
from impala_vllm.fleet.registry.source import Source
from impala_vllm.fleet.scoring import Load
from impala_vllm.fleet.server import Address, AskingConfig, Hooks, Server, State

logger = logging.getLogger("impala.fleet")

MAX_REMEMBERED = 1000
MAX_REMEMBERED_CHARS = 512
"""Names of models, asked for by clients, for which answers are kept."""


class AddressError(ValueError):
    """Not a server's address; one line."""


@dataclass(slots=True)
class Family:
    """Servers of one model that hash alike."""

    hello: Hello
    scheme: Scheme
    members: set[ServerId] = field(default_factory=set[ServerId])
    """Servers that were believed; they may have gone since."""
    chats: str | None = None
    """How its chats are rendered here."""
    prompts: Prompts | None = None
    """None while the tokenizer loads, and where it cannot be."""


class Serving(NamedTuple):
    """Who serves a model."""

    loads: Mapping[Replica, Load]
    family: Family | None
    adapter: Adapter | None


class Fleet:
    """Use as an async context manager."""

    def __init__(
        self,
        index: Index,
        tokenizer: str | None = None,
        server_key: str | None = None,
        config: AskingConfig | None = None,
    ) -> None:
        """`tokenizer`: a directory or a name, in place of what handshakes say."""
        self.index = index
        self.loads: dict[Replica, Load] = {}
        self.servers: dict[ServerId, Server] = {}
        self.on_lost: Callable[[Replica], None] = index.clear
        self.on_loaded: Callable[[], None] = lambda: None
        """A tokenizer has been loaded."""
        self.is_told: Callable[[Replica], bool] = lambda _: False
        """By another router, through a registry."""
        self._tokenizer = tokenizer
        self._headers = {"authorization": f"Bearer {server_key}"} if server_key else {}
        self._config = config or AskingConfig()
        self._families: dict[str, Family] = {}
        self._tasks: dict[ServerId, asyncio.Task[None]] = {}
        self._loading: set[asyncio.Task[None]] = set()
        self._serving: dict[str | None, Serving] = {}
        """Answers of `serving`, until something changes."""
        self.listed: set[ServerId] = set()
        """In the file that is followed: they stay until their line goes."""

    async def __aenter__(self) -> "Fleet":
        self._context = zmq.asyncio.Context()
        self.session = aiohttp.ClientSession(
            # vLLM closes what was idle for 5 s; who asks in that moment is told that the connection broke.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4, socket_factory=open_socket),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),  # one client's cookies are no other's
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in [*self._tasks.values(), *self._loading]:
            task.cancel()
        await asyncio.gather(*self._tasks.values(), *self._loading, return_exceptions=True)
        await asyncio.gather(*(server.close() for server in self.servers.values()))
        await self.session.close()
        self._context.destroy(linger=0)

    def add(self, address: Address) -> Server:
        """Take a server in; the one that is there under this address already, where there is one.

        One that was being let go stays.
        """
        known = self.servers.get(address.url)
        if known is not None:
            known.stay()
            return known
        hooks = Hooks(self._greet, self._changed, self._lost)
        server = Server(address, self.index, self.session, self._context, self._headers, hooks, self._config)
        self.servers[server.id] = server
        self._tasks[server.id] = asyncio.create_task(server.run(), name=f"asks {server.id}")
        self._changed(server)
        return server

    async def remove(self, server_id: ServerId, drain_s: float = 0.0) -> bool:
        """Let a server go, once what runs there has ended or `drain_s` are over.

        False: no such server, or it was added again, or removed by another call, meanwhile.
        """
        server = self.servers.get(server_id)
        if server is None:
            return False
        server.drain()
        loop = asyncio.get_running_loop()
        until_s = loop.time() + drain_s
        while server.state is State.DRAINING and self._is_busy(server) and loop.time() < until_s:
            await asyncio.sleep(0.05)
        if server.state is not State.DRAINING or self.servers.get(server_id) is not server:
            return False
        del self.servers[server_id]
        task = self._tasks.pop(server_id)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await server.close()
        for replica in server.replicas:
            self.on_lost(replica)
            self.loads.pop(replica, None)
        self._serving.clear()
        return True

    def serving(self, model: str | None) -> Serving:
        """Who may serve a model: servers that say so, and where none does, all."""
        found = self._serving.get(model)
        if found is None:
            found = self._find(model)
            if len(model or "") > MAX_REMEMBERED_CHARS:  # clients make names up
                return found
            if len(self._serving) >= MAX_REMEMBERED:
                self._serving.clear()
            self._serving[model] = found
        return found

    def sources(self) -> dict[Replica, Source]:
        """Replicas whose hashes are believed, for a registry."""
        found: dict[Replica, Source] = {}
        for server in self.servers.values():
            if server.hello is None or server.problem is not None or server.state not in (State.UP, State.DRAINING):
                continue
            space = layout.namespace(server.hello)
            epochs = {rank.dp_rank: rank.epoch for rank in server.hello.ranks}
            for replica in server.replicas:
                if replica.dp_rank in epochs:
                    found[replica] = Source(space, epochs[replica.dp_rank], server.has_events(replica))
        return found

    def flight(self, replica: Replica) -> contextlib.AbstractAsyncContextManager[None]:
        """Around a request to a replica, see `Server.flight`."""
        server = self.servers.get(replica.server)
        return server.flight() if server is not None else contextlib.nullcontext()

    def has_events(self, replica: Replica) -> bool:
        """Whether what the replica holds is told, by itself or by another router."""
        server = self.servers.get(replica.server)
        return (server is not None and server.has_events(replica)) or self.is_told(replica)

    async def settled(self) -> None:
        """Wait until every server was asked once and tokenizers are loaded, or could not be."""
        await asyncio.gather(*(server.ask() for server in list(self.servers.values())))
        await asyncio.gather(*self._loading, return_exceptions=True)

    async def follow_file(self, path: Path, every_s: float = 2.0) -> None:
        """Keep the fleet as the file says: one address a line. What was added otherwise stays. Never returns.

        Whoever writes it may do so in steps: a change counts once two looks agree, and an empty file says nothing.
        """
        seen: str | None = None
        said = ""
        while True:
            try:
                text = await asyncio.to_thread(path.read_text, encoding="utf-8")
                is_settled = seen in (None, text)
                seen = text
                if not text.strip() and self.listed:
                    raise AddressError(f"{path}: it is empty; to let all its servers go, leave a line with #")
                if is_settled:
                    self._adopt(parse_file(text, str(path)))
                said = ""
            except (OSError, UnicodeDecodeError, AddressError) as e:
                if str(e) != said:
                    said = str(e)
                    logger.warning("%s; the fleet stays as it is", " ".join(said.split()))
            await asyncio.sleep(every_s)

    def _adopt(self, addresses: Sequence[Address]) -> None:
        wanted = {address.url for address in addresses}
        for gone in self.listed - wanted:
            self._loading.add(task := asyncio.create_task(self._let_go(gone)))
            task.add_done_callback(self._loading.discard)
        for address in addresses:
            self.add(address)
        self.listed = wanted

    async def _let_go(self, server_id: ServerId) -> None:
        await self.remove(server_id, drain_s=600.0)

    def _is_busy(self, server: Server) -> bool:
        return any(self.loads[r].num_running for r in server.replicas if r in self.loads)

    def _find(self, model: str | None) -> Serving:
        able = [s for s in self.servers.values() if s.models is None or model is None or model in s.models]
        servers = able or list(self.servers.values())
        loads = {r: self.loads[r] for s in servers for r in s.replicas if r in self.loads}
        speakers = [s for s in servers if s.hello is not None and s.problem is None]
        if not speakers or speakers[0].hello is None:
            return Serving(loads, None, None)
        models = speakers[0].models or {}
        return Serving(loads, self._families.get(speakers[0].hello.model), models.get(model or ""))

    def _greet(self, server: Server, hello: Hello) -> str | None:
        scheme = handshake.scheme_of(hello)
        handshake.group_of(hello)
        family = self._families.get(hello.model)
        if family is None:
            family = self._families[hello.model] = Family(hello, scheme)
            self._loading.add(task := asyncio.create_task(self._load_tokenizer(family)))
            task.add_done_callback(self._loading.discard)
        differences = handshake.differences(family.hello, hello)
        family.members.discard(server.id)
        if differences and not family.members & self.servers.keys():  # all others have gone or moved on: a new version
            del self._families[hello.model]
            return self._greet(server, hello)
        if not differences:
            family.members.add(server.id)
        server.judge_chats(family.chats, hello)
        return "; ".join(differences) or None

    async def _load_tokenizer(self, family: Family) -> None:
        name, start_s = self._tokenizer or family.hello.tokenizer, time.monotonic()
        try:
            tokenizer = await asyncio.to_thread(Tokenizer, name, family.hello.revision)
        except TokenizerError as e:
            logger.error("prompts of %s cannot be hashed, its traces are routed by load: %s", family.hello.model, e)
            return
        family.prompts = Prompts(family.scheme, tokenizer)
        family.chats = handshake.chats_of(tokenizer.template)
        for server in self.servers.values():
            if server.hello is not None and server.hello.model == family.hello.model:
                server.judge_chats(family.chats)
        self.on_loaded()
        logger.info("tokenizer of %s loaded in %.1f s", family.hello.model, time.monotonic() - start_s)

    def _lost(self, replica: Replica) -> None:
        self.on_lost(replica)

    def _changed(self, server: Server) -> None:
        self._serving.clear()
        if server.id not in self.servers:
            return
        for replica in [r for r in self.loads if r.server == server.id and r not in server.replicas]:
            self.on_lost(replica)
            self.loads.pop(replica).is_open = False  # requests on their way may still choose from what they saw
        for replica in server.replicas:
            load = self.loads.setdefault(replica, Load())
            load.is_open = server.state is State.UP
            ranks = server.hello.ranks if server.hello is not None else ()
            load.capacity_tokens = next((r.hbm_tokens for r in ranks if r.dp_rank == replica.dp_rank), None)


def parse_address(text: str) -> Address:
    """`URL`, or `URL=EVENTS[,REPLAY]`. Raises AddressError."""
    url, _, events = text.strip().partition("=")
    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")) or not url.partition("//")[2]:
        raise AddressError(f"{text.strip()}: not a server; write http://HOST:PORT")
    if not events:
        return Address(ServerId(url))
    at, _, replay = events.partition(",")
    try:
        return Address(ServerId(url), Endpoints(at, replay or None))
    except EndpointError as e:
        raise AddressError(str(e)) from e


def parse_file(text: str, where: str) -> list[Address]:
    """Addresses, one a line; blank lines and those that begin with # are left out. Raises AddressError."""
    addresses: list[Address] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                addresses.append(parse_address(line))
            except AddressError as e:
                raise AddressError(f"{where}:{number}: {e}") from e
    return addresses

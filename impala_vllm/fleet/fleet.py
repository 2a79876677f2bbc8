"""All servers: added and removed while requests run, by hand and by a file, and who serves what. One event loop."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import aiohttp
import zmq.asyncio

from impala_vllm.fleet.addresses import Address, AddressError, parse_file
from impala_vllm.fleet.asking import AskingConfig
from impala_vllm.fleet.connection import open_socket
from impala_vllm.fleet.families import Families, Family
from impala_vllm.fleet.hashing import Adapter
from impala_vllm.fleet.index import Index
from impala_vllm.fleet.pace import Pace
from impala_vllm.fleet.places import Replica, ServerId
from impala_vllm.fleet.registry import layout
from impala_vllm.fleet.registry.source import Source
from impala_vllm.fleet.scoring import Load
from impala_vllm.fleet.server import Hooks, Server, State

logger = logging.getLogger("impala.fleet")

MAX_REMEMBERED = 1000
MAX_REMEMBERED_CHARS = 512
"""Names of models, asked for by clients, for which answers are kept."""


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
        lot: Random | None = None,
    ) -> None:
        """`tokenizer`: a directory or a name, in place of what handshakes say. `lot`: when servers are looked at."""
        self.index = index
        self.loads: dict[Replica, Load] = {}
        self.servers: dict[ServerId, Server] = {}
        self.on_lost: Callable[[Replica], None] = index.clear
        self.is_told: Callable[[Replica], bool] = lambda _: False
        """By another router, through a registry."""
        self._headers = {"authorization": f"Bearer {server_key}"} if server_key else {}
        self._config = config or AskingConfig()
        self.pace = Pace(self._config, lot or Random())
        self.families = Families(self.servers, tokenizer, self.pace)
        self._tasks: dict[ServerId, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._serving: dict[str | None, Serving] = {}
        """Answers of `serving`, until something changes."""
        self.listed: dict[ServerId, Address] = {}
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
        for task in [*self._tasks.values(), *self._leaving]:
            task.cancel()
        await asyncio.gather(*self._tasks.values(), *self._leaving, return_exceptions=True)
        await self.families.close()
        await asyncio.gather(*(server.close() for server in self.servers.values()))
        await self.session.close()
        self._context.destroy(linger=0)

    def add(self, address: Address) -> Server:
        """Take a server in; the one that is there under this URL already, where there is one.

        One that was being let go stays, and publishes where is said now; where nothing is said, where it did.
        """
        known = self.servers.get(address.url)
        if known is not None:
            known.stay()
            if address.events is not None:
                known.publishes(address.events)
            return known
        hooks = Hooks(self.families.greet, self._changed, self._lost)
        server = Server(address, self.index, self.session, self._context, self._headers, hooks, self._config, self.pace)
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
                    found[replica] = Source(space, epochs[replica.dp_rank], server.knows(replica))
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
        await self.families.loaded()

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
        wanted = {address.url: address for address in addresses}
        for gone in self.listed.keys() - wanted.keys():
            self._leaving.add(task := asyncio.create_task(self._let_go(gone)))
            task.add_done_callback(self._leaving.discard)
        for address in addresses:
            server = self.add(address)
            before = self.listed.get(address.url)
            if address.events is None and before is not None and before.events is not None:
                server.publishes(None)
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
        return Serving(loads, self.families.get(speakers[0].hello.model), models.get(model or ""))

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

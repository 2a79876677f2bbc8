"""One request through the proxy: choose, send, stream back; try elsewhere only while the client has seen nothing.

A plain ASGI application: nothing is buffered but the request's body, which routing reads. A client that leaves ends the
upstream request, which ends the work in the engine.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import aiohttp

from impala_vllm.core.types import Outcome
from impala_vllm.fleet import faults
from impala_vllm.fleet.fleet import Fleet
from impala_vllm.fleet.places import Replica
from impala_vllm.fleet.proxy.bodies import RETRY_AFTER_S, Bodies, Body, BodyError, ClientGone
from impala_vllm.fleet.proxy.headers import for_client, for_server, with_rank
from impala_vllm.fleet.proxy.metrics import Metrics
from impala_vllm.fleet.proxy.reading import Read, Reader
from impala_vllm.fleet.proxy.replies import break_off, refuse, refuse_body
from impala_vllm.fleet.proxy.stored import Beginning, Stored
from impala_vllm.fleet.proxy.watch import Message, Receive, Scope, Send, Watch
from impala_vllm.fleet.router import Router, Ticket
from impala_vllm.fleet.scoring import Load

logger = logging.getLogger("impala.fleet")

MAX_TRIES = 3
_BUSY = frozenset({429, 502, 503, 504})
"""Answers after which another server is tried."""


@dataclass(slots=True)
class _Call:
    """A request that has been read."""

    scope: Scope
    send: Send
    read: Read
    headers: list[tuple[str, str]]
    body: Body
    tried: set[Replica] = field(default_factory=set[Replica])


class Forward:
    """The routes that go to servers."""

    def __init__(
        self,
        fleet: Fleet,
        router: Router,
        reader: Reader,
        bodies: Bodies,
        stored: Stored,
        metrics: Metrics,
        explains: bool,
    ) -> None:
        self._fleet = fleet
        self._router = router
        self._reader = reader
        self._bodies = bodies
        self._stored = stored
        self._metrics = metrics
        self._explains = explains

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            body = await self._bodies.read(scope["headers"], receive)
        except ClientGone:
            return
        except BodyError as e:
            await refuse_body(send, e)
            return
        try:
            with Watch(receive) as watch:
                await self._answer(scope, body, send)
        finally:
            body.release()
        if watch.has_left:
            self._metrics.left.inc()

    async def _answer(self, scope: Scope, body: Body, send: Send) -> None:
        headers = for_server(scope["headers"])
        said = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        read = await self._reader.read(scope["path"], said, body.data)
        call = _Call(scope, send, read, headers, body)
        loop = asyncio.get_running_loop()
        while True:
            started_s = loop.time()
            ticket = self._router.start(read.turn, self.among(read), call.tried, started_s)
            if ticket is None:
                await refuse(send, 503, "no server is available; try again", RETRY_AFTER_S)
                self._metrics.refused.inc()
                return
            self._metrics.decided(ticket, loop.time() - started_s)
            if self._explains:
                _explain(ticket)
            call.tried.add(ticket.decision.replica)
            if await self._try(ticket, call):
                return
            self._metrics.retries.inc()

    def among(self, read: Read) -> Mapping[Replica, Load]:
        """Whom it may be sent to, now: servers come and go while a request waits.

        What goes on from a stored answer goes where that is, to none other.
        """
        loads = self._fleet.serving(read.model).loads
        home = self._stored.home(read.previous_response) if read.previous_response is not None else None
        if home is None or home not in self._fleet.servers:
            return loads
        return {replica: load for replica, load in self._fleet.loads.items() if replica.server == home}

    def _is_last(self, call: _Call) -> bool:
        """Whether there is nobody else to try."""
        loads = self.among(call.read)
        return len(call.tried) >= MAX_TRIES or not any(load.is_open for r, load in loads.items() if r not in call.tried)

    async def _try(self, ticket: Ticket, call: _Call) -> bool:
        """Send it there; False: the client has seen nothing and another server may do better."""
        replica, send = ticket.decision.replica, call.send
        outcome = Outcome.ERROR
        has_begun = False
        try:
            async with self._fleet.flight(replica), await self._ask(replica, call) as response:
                if response.status in _BUSY and not self._is_last(call):
                    return False
                head = _head(response, ticket, self._explains)
                is_kept = response.status == 200 and call.scope["path"] == "/v1/responses"
                beginning = Beginning(self._stored, replica.server) if is_kept else None
                async for chunk in response.content.iter_any():
                    if not has_begun:
                        has_begun = True
                        call.body.release()
                        if response.status == 200:
                            self._router.answer(ticket, asyncio.get_running_loop().time())
                        await send(head)
                    if beginning is not None:
                        beginning.hear(chunk)
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                if not has_begun:
                    has_begun = True
                    await send(head)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                outcome = Outcome.UNKNOWN if response.status < 400 else Outcome.ERROR
                return True
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as e:
            self._metrics.broken.inc()
            server = self._fleet.servers.get(replica.server)
            if server is not None and isinstance(e, aiohttp.ClientConnectorError) and faults.is_gone(e):
                server.suspect()
            if has_begun:
                logger.warning("%s broke off an answer (%s)", replica.server, type(e).__name__)
                await break_off(send, call.read.is_stream)
                return True
            if self._is_last(call):
                await refuse(send, 502, "the server went away before it answered; try again", RETRY_AFTER_S)
                return True
            return False
        except asyncio.CancelledError:
            outcome = Outcome.ABORT
            raise
        finally:
            self._router.end(ticket, outcome, self._fleet.has_events(replica), asyncio.get_running_loop().time())

    async def _ask(self, replica: Replica, call: _Call) -> aiohttp.ClientResponse:
        """What the server answers, as soon as it begins to.

        A connection that breaks before that was closed, most likely, when it had been idle for long: asked once more.
        """
        headers = call.headers
        if any(other.server == replica.server and other != replica for other in call.read.serving.loads):
            headers = with_rank(headers, replica.dp_rank)
        ask = partial(
            self._fleet.session.request,
            call.scope["method"],
            _url(replica, call.scope),
            data=call.body.data,
            headers=headers,
            allow_redirects=False,
        )
        try:
            return await ask()
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError):
            raise
        except aiohttp.ClientConnectionError:
            return await ask()


def _url(replica: Replica, scope: Scope) -> str:
    query = scope["query_string"].decode("latin-1")
    return replica.server + scope["path"] + (f"?{query}" if query else "")


def _head(response: aiohttp.ClientResponse, ticket: Ticket, explains: bool) -> Message:
    headers = for_client(response.raw_headers)
    if response.status in (429, 503) and not any(name == b"retry-after" for name, _ in headers):
        headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    if explains:
        decision = ticket.decision
        said = f"{decision.replica.server} {decision.reason.value} {decision.cached_tokens}/{ticket.turn.num_tokens}"
        headers.append((b"x-impala-decision", said.encode("latin-1", "replace")))
    return {"type": "http.response.start", "status": response.status, "headers": headers}


def _explain(ticket: Ticket) -> None:
    decision = ticket.decision
    logger.info(
        "%s %s: %d of %d tokens in reach, %.3f s, trace %s (%s)",
        decision.replica.server,
        decision.reason.value,
        decision.cached_tokens,
        ticket.turn.num_tokens,
        decision.total_s,
        ticket.link.trace_id,
        ticket.link.source.value,
    )

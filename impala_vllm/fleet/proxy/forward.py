"""One request through the proxy: choose, send, stream back; try elsewhere only while the client has seen nothing.

A plain ASGI application: nothing is buffered but the request's body, which routing reads. A client that leaves ends the
upstream request, which ends the work in the engine.
"""

import asyncio
import json
import logging
from collections.abc import Iterable
from functools import partial

import aiohttp

from impala_vllm.core.types import Outcome
from impala_vllm.fleet import faults
from impala_vllm.fleet.fleet import Fleet
from impala_vllm.fleet.places import Replica
from impala_vllm.fleet.proxy.headers import for_client, for_server, with_rank
from impala_vllm.fleet.proxy.metrics import Metrics
from impala_vllm.fleet.proxy.reading import Read, Reader
from impala_vllm.fleet.proxy.watch import Message, Receive, Scope, Send, Watch
from impala_vllm.fleet.router import Router, Ticket

logger = logging.getLogger("impala.fleet")

MAX_BODY_BYTES = 256 << 20
MAX_TRIES = 3
RETRY_AFTER_S = 2
_BUSY = frozenset({429, 502, 503, 504})
"""Answers after which another server is tried."""


class _Gone(Exception):
    """The client has left."""


class Forward:
    """The routes that go to servers."""

    def __init__(self, fleet: Fleet, router: Router, reader: Reader, metrics: Metrics, explains: bool) -> None:
        self._fleet = fleet
        self._router = router
        self._reader = reader
        self._metrics = metrics
        self._explains = explains

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            body = await _body(receive)
        except _Gone:
            return
        if body is None:
            await _refuse(send, 413, f"the body is larger than {MAX_BODY_BYTES >> 20} MiB")
            return
        with Watch(receive) as watch:
            await self._answer(scope, body, send)
        if watch.has_left:
            self._metrics.left.inc()

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        forwarded = for_server(scope["headers"])
        if forwarded is None:
            await _refuse(send, 400, "a header is not text in UTF-8")
            return
        read = await self._reader.read(scope["path"], headers, body)
        tried: set[Replica] = set()
        loop = asyncio.get_running_loop()
        while True:
            started_s = loop.time()
            ticket = self._router.start(read.turn, self._fleet.serving(read.model).loads, tried, started_s)
            if ticket is None:
                await _refuse(send, 503, "no server is available; try again", RETRY_AFTER_S)
                self._metrics.refused.inc()
                return
            self._metrics.decided(ticket, loop.time() - started_s)
            if self._explains:
                _explain(ticket)
            tried.add(ticket.decision.replica)
            if await self._try(ticket, read, scope, forwarded, body, send, tried):
                return
            self._metrics.retries.inc()

    def _is_last(self, read: Read, tried: set[Replica]) -> bool:
        """Whether there is nobody else to try, now: servers come and go while a request waits."""
        loads = self._fleet.serving(read.model).loads
        return len(tried) >= MAX_TRIES or not any(load.is_open for r, load in loads.items() if r not in tried)

    async def _try(
        self,
        ticket: Ticket,
        read: Read,
        scope: Scope,
        headers: list[tuple[str, str]],
        body: bytes,
        send: Send,
        tried: set[Replica],
    ) -> bool:
        """Send it there; False: the client has seen nothing and another server may do better."""
        replica = ticket.decision.replica
        outcome = Outcome.ERROR
        has_begun = False
        if any(other.server == replica.server and other != replica for other in read.serving.loads):
            headers = with_rank(headers, replica.dp_rank)
        try:
            async with self._fleet.flight(replica), await self._ask(replica, scope, headers, body) as response:
                if response.status in _BUSY and not self._is_last(read, tried):
                    return False
                head = _head(response, ticket, self._explains)
                async for chunk in response.content.iter_any():
                    if not has_begun:
                        has_begun = True
                        if response.status == 200:
                            self._router.answer(ticket, asyncio.get_running_loop().time())
                        await send(head)
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
                await _break_off(send, read.is_stream)
                return True
            if self._is_last(read, tried):
                await _refuse(send, 502, "the server went away before it answered; try again", RETRY_AFTER_S)
                return True
            return False
        except asyncio.CancelledError:
            outcome = Outcome.ABORT
            raise
        finally:
            self._router.end(ticket, outcome, self._fleet.has_events(replica), asyncio.get_running_loop().time())

    async def _ask(
        self, replica: Replica, scope: Scope, headers: list[tuple[str, str]], body: bytes
    ) -> aiohttp.ClientResponse:
        """What the server answers, as soon as it begins to.

        A connection that breaks before that was closed, most likely, when it had been idle for long: asked once more.
        """
        ask = partial(
            self._fleet.session.request,
            scope["method"],
            _url(replica, scope),
            data=body,
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


async def _body(receive: Receive) -> bytes | None:
    """None: too large. Raises _Gone."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY_BYTES:
            return None
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def _break_off(send: Send, is_stream: bool) -> None:
    """End a stream with an error its reader understands; anything else is cut, so that it is not taken for whole."""
    if not is_stream:
        raise ConnectionError("the server broke off its answer")
    error = {"message": "the server went away during the answer", "type": "server_error", "code": 502}
    event = b"\n\ndata: " + json.dumps({"error": error}).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": event, "more_body": False})


async def _refuse(send: Send, status: int, message: str, retry_after_s: int | None = None) -> None:
    body = json.dumps({"error": {"message": message, "type": "router_error", "code": status}}).encode()
    headers: Iterable[tuple[bytes, bytes]] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *([(b"retry-after", str(retry_after_s).encode())] if retry_after_s is not None else []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})

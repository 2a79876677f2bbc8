"""Answers of /v1/responses that servers keep: which one keeps which, and the routes that ask for them.

A server keeps them in its own memory, so what refers to one has to go there. Ids are kept as digests.
"""

import re
from collections import OrderedDict
from hashlib import blake2b
from urllib.parse import quote

import aiohttp
from yarl import URL

from impala_vllm.fleet.fleet import Fleet
from impala_vllm.fleet.places import Replica, ServerId
from impala_vllm.fleet.proxy.bodies import RETRY_AFTER_S, Bodies, BodyError, ClientGone
from impala_vllm.fleet.proxy.headers import for_client, for_server
from impala_vllm.fleet.proxy.replies import break_off, refuse, refuse_body
from impala_vllm.fleet.proxy.watch import Receive, Scope, Send, Watch

MAX_IDS = 200_000
"""Answers that are remembered, 200 bytes each; those that nothing referred to for the longest time go."""
_ID_WITHIN_BYTES = 4096
_ID = re.compile(rb'"id"\s*:\s*"([^"\\]{1,256})"')
"""The first one of an answer, or of the event that begins a stream, is the answer's own."""


class Stored:
    """Used on one thread."""

    def __init__(self, max_ids: int = MAX_IDS) -> None:
        self._max_ids = max_ids
        self._homes: OrderedDict[bytes, ServerId] = OrderedDict()

    def note(self, response_id: str, server: ServerId) -> None:
        """The server has given an answer this id. Clients may choose ids: the first one to do so keeps it."""
        digest = _digest(response_id)
        self._homes.setdefault(digest, server)
        self._homes.move_to_end(digest)
        while len(self._homes) > self._max_ids:
            self._homes.popitem(last=False)

    def home(self, response_id: str) -> ServerId | None:
        """Who keeps it; None: not known, or no longer."""
        digest = _digest(response_id)
        server = self._homes.get(digest)
        if server is not None:
            self._homes.move_to_end(digest)
        return server


class Beginning:
    """Of one answer, until its id was found."""

    def __init__(self, stored: Stored, server: ServerId) -> None:
        self._stored = stored
        self._server = server
        self._text: bytes | None = b""

    def hear(self, chunk: bytes) -> None:
        """The next part of it, in whatever pieces it comes."""
        if self._text is None:
            return
        self._text += chunk[:_ID_WITHIN_BYTES]
        found = _ID.search(self._text)
        if found is not None:
            self._stored.note(found[1].decode("utf-8", "replace"), self._server)
        if found is not None or len(self._text) >= _ID_WITHIN_BYTES:
            self._text = None


class StoredRoutes:
    """GET and DELETE of an answer, and its cancelling: an ASGI application behind a route with `response_id`."""

    def __init__(self, fleet: Fleet, stored: Stored, bodies: Bodies) -> None:
        self._fleet = fleet
        self._stored = stored
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass it through to the server that keeps the answer."""
        response_id: str = scope["path_params"]["response_id"]
        home = self._stored.home(response_id)
        headers = for_server(scope["headers"])
        if home is None or home not in self._fleet.servers:
            text = "no such response is known here; it came through another router, is long ago, or its server has gone"
            await refuse(send, 404, text)
            return
        try:
            body = await self._bodies.read(scope["headers"], receive)
        except ClientGone:
            return
        except BodyError as e:
            await refuse_body(send, e)
            return
        ending = "/cancel" if scope["path"].endswith("/cancel") else ""
        query = scope["query_string"].decode("latin-1")
        path = f"/v1/responses/{quote(response_id, safe='')}{ending}" + (f"?{query}" if query else "")
        try:
            with Watch(receive):
                await self._pass(scope["method"], home, path, headers, body.data, send)
        finally:
            body.release()

    async def _pass(
        self, method: str, home: ServerId, path: str, headers: list[tuple[str, str]], body: bytes, send: Send
    ) -> None:
        has_begun = is_stream = False
        url = URL(home + path, encoded=True)
        ask = self._fleet.session.request
        try:
            async with (
                self._fleet.flight(Replica(home)),
                ask(method, url, data=body or None, headers=headers, allow_redirects=False) as response,
            ):
                is_stream = response.content_type == "text/event-stream"
                head = for_client(response.raw_headers)
                has_begun = True
                await send({"type": "http.response.start", "status": response.status, "headers": head})
                async for chunk in response.content.iter_any():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (aiohttp.ClientError, ConnectionError, TimeoutError):
            if has_begun:
                await break_off(send, is_stream)
            else:
                await refuse(send, 502, "the server that keeps it does not answer; try again", RETRY_AFTER_S)


def _digest(response_id: str) -> bytes:
    return blake2b(response_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()

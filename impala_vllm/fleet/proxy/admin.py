"""Routes that the router answers itself.

Those that tell of the fleet or change it answer to whoever has the admin key, or without one to this machine only, and
not through a proxy: whoever adds a server gets to read prompts.
"""

import asyncio
import hmac
from typing import Any
from urllib.parse import urlsplit

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from impala_vllm.fleet.addresses import AddressError, parse_address
from impala_vllm.fleet.places import ServerId
from impala_vllm.fleet.proxy.bodies import BodyError, ClientGone
from impala_vllm.fleet.proxy.gateway import Gateway
from impala_vllm.fleet.server import Server

_LOCAL = ("127.0.0.1", "::1")
_LOCAL_NAMES = ("127.0.0.1", "::1", "localhost")
_OF_PROXIES = ("forwarded", "x-forwarded-", "x-real-ip", "via")
"""Beginnings of names of headers: somebody else than the peer asks, from wherever."""


class _Addition(msgspec.Struct, forbid_unknown_fields=True):
    url: str
    kv_events: str | None = None
    """EVENTS[,REPLAY]; none: as its handshake says, or as was said before."""


class Admin:
    """One router's."""

    def __init__(self, site: Gateway) -> None:
        self._site = site
        self._fleet = site.fleet

    async def models(self, request: Request) -> Response:
        cards = {str(card.get("id")): card for s in self._fleet.servers.values() for card in s.model_cards}
        return JSONResponse({"object": "list", "data": list(cards.values())})

    async def health(self, request: Request) -> Response:
        num_open = sum(load.is_open for load in self._fleet.loads.values())
        body = {"status": "ok" if num_open else "no server", "open": num_open, "known": len(self._fleet.loads)}
        if (registry := self._site.registry) is not None:
            body["registry"] = registry.problem or "ok"
        return JSONResponse(body, 200 if num_open else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._site.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def route(self, request: Request) -> Response:
        """Where a request should go and why. The body is the request's, with its `path`; whoever asks sends it."""
        if (refusal := self._refusal(request)) is not None:
            return refusal
        path = request.query_params.get("path", "/v1/chat/completions")
        try:
            body = await self._body(request)
        except BodyError as e:
            return _refused_body(e)
        read = await self._site.reader.read(path, dict(request.headers), body)
        plan = self._site.router.advise(read.turn, self._site.forward.among(read), asyncio.get_running_loop().time())
        if plan.decision is None:
            return JSONResponse({"error": "no server is available"}, 503, {"retry-after": "2"})
        decision = plan.decision
        return JSONResponse(
            {
                "server": decision.replica.server,
                "dp_rank": decision.replica.dp_rank,
                "reason": decision.reason.value,
                "prompt_tokens": read.turn.num_tokens,
                "cached_tokens": decision.cached_tokens,
                "is_hashed": read.turn.prompt is not None,
                "prices": [
                    {"server": r.server, "dp_rank": r.dp_rank, **terms._asdict(), "total_s": terms.total_s}
                    for r, terms in plan.terms.items()
                ],
            }
        )

    async def list_servers(self, request: Request) -> Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        return JSONResponse({"servers": [self._describe(server) for server in self._fleet.servers.values()]})

    async def add_server(self, request: Request) -> Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        try:
            asked = msgspec.json.decode(await self._body(request), type=_Addition)
            address = parse_address(f"{asked.url}={asked.kv_events}" if asked.kv_events else asked.url)
        except (msgspec.DecodeError, AddressError) as e:
            return JSONResponse({"error": str(e)}, 400)
        except BodyError as e:
            return _refused_body(e)
        known = self._fleet.servers.get(address.url)
        if known is not None and known.id in self._fleet.listed and address.events not in (None, known.address.events):
            return JSONResponse({"error": f"{known.id} is in {self._site.options.workers_file}; change its line"}, 409)
        return JSONResponse(self._describe(self._fleet.add(address)), 201 if known is None else 200)

    async def remove_server(self, request: Request) -> Response:
        """Drains: the answer comes once what ran there has ended, or time is up."""
        if (refusal := self._refusal(request)) is not None:
            return refusal
        url = request.query_params.get("url", "").rstrip("/")
        if ServerId(url) not in self._fleet.servers:
            return JSONResponse({"error": f"no server {url!r}"}, 404)
        if ServerId(url) in self._fleet.listed:
            return JSONResponse({"error": f"{url} is in {self._site.options.workers_file}; take its line out"}, 409)
        if not await self._fleet.remove(ServerId(url), self._site.options.drain_s):
            return JSONResponse({"error": f"{url} was added again, or removed by another call, meanwhile"}, 409)
        return JSONResponse({"removed": url})

    async def _body(self, request: Request) -> bytes:
        """Raises BodyError."""
        try:
            body = await self._site.bodies.read(request.scope["headers"], request.receive)
        except ClientGone as e:
            raise BodyError(400, "the client has left") from e
        data = body.data
        body.release()
        return data

    def _describe(self, server: Server) -> dict[str, Any]:
        return {
            "url": server.id,
            "state": server.state.value,
            "hashes": server.problem or server.chat_problem or "ok",
            "events": server.feeds.problem or "ok",
            "models": sorted(server.models) if server.models is not None else None,
            "ranks": [
                {
                    "dp_rank": replica.dp_rank,
                    "running": self._fleet.loads[replica].num_running if replica in self._fleet.loads else 0,
                    "knowledge": follower.completeness.value if follower else "nothing",
                    "batches": follower.counts.batches if follower else 0,
                    "losses": follower.counts.losses if follower else 0,
                }
                for replica in server.replicas
                for follower in [server.feeds.followers.get(replica)]
            ],
        }

    def _refusal(self, request: Request) -> Response | None:
        """None: whoever asks may. A page in a browser on this machine may not, though it can ask."""
        key = self._site.options.admin_key
        said, origin = request.headers.get("authorization", ""), request.headers.get("origin")
        if key is not None and not hmac.compare_digest(said.encode(), f"Bearer {key}".encode()):
            return _forbidden("it wants the key that --admin-key set")
        if key is None and (request.client is None or request.client.host not in _LOCAL):
            return _forbidden("for this machine only; elsewhere it wants --admin-key")
        if key is None and any(name.startswith(_OF_PROXIES) for name in request.headers):
            return _forbidden("not through a proxy without --admin-key")
        if origin is not None and not _is_own(origin, request.headers.get("host", ""), key is not None):
            return _forbidden("not for pages of other sites")
        # Pages can send forms and text to other sites without asking, but not this.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and kind != "application/json":
            return JSONResponse({"error": "send it as application/json"}, 415)
        return None


def _is_own(origin: str, host: str, has_key: bool) -> bool:
    """Whether a page came from the router's own address. Without a key that is a local name: others can be made up."""
    try:
        parts = urlsplit(origin)
        return parts.netloc == host and (has_key or parts.hostname in _LOCAL_NAMES)
    except ValueError:
        return False


def _refused_body(error: BodyError) -> Response:
    again = {"retry-after": str(error.retry_after_s)} if error.retry_after_s is not None else {}
    return JSONResponse({"error": str(error)}, error.status, {"connection": "close", **again})


def _forbidden(why: str) -> Response:
    return JSONResponse({"error": why}, 403)

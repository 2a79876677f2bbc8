"""Pure ASGI middleware in front of vLLM's HTTP server.

Notes who sends each request (see `caller`), serves /impala/* and adds impala's metrics to /metrics.
Requests and responses of vLLM pass through untouched and unbuffered; the body is read along, not changed.
"""

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from impala_vllm import caller as callers
from impala_vllm.adapters.vllm import endpoints, hello, metrics
from impala_vllm.adapters.vllm.engine import Engine, current_caller
from impala_vllm.caller import Caller

logger = logging.getLogger("vllm.impala")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Middleware:
    """Added to vLLM's own list by the plugin, only where impala is selected."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._engine: Engine | None = None
        self._is_off = False
        self._authentication: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] not in ("http", "websocket") or (engine := self._connect(scope)) is None:
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self._pass(engine, scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path.startswith(endpoints.PREFIX + "/"):
            await self._serve(engine, path, scope, receive, send)
        elif path == "/metrics" and scope["method"] == "GET":
            await metrics.append(self._app, engine, scope, receive, send)
        elif scope["method"] == "POST":
            await self._pass(engine, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _pass(self, engine: Engine, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, with its caller known to whoever calls the engine on its behalf."""
        headers = _headers(scope)
        config = engine.config.metadata
        caller = callers.from_headers(headers, config)
        token = current_caller.set(caller)
        try:
            if caller.session is None and headers.get("content-type", "").startswith("application/json"):
                receive = _reading_along(receive, caller, engine)
            await self._app(scope, receive, send)
        finally:
            current_caller.reset(token)

    async def _serve(self, engine: Engine, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        method = "POST" if path == endpoints.OUTCOME_PATH else "GET"
        if scope["method"] != method:
            found = endpoints.Answer(405, b'{"error": "%s only"}' % method.encode())
        elif path not in endpoints.OPEN_PATHS and not self._may_enter(scope):
            found = endpoints.Answer(401, b'{"error": "Unauthorized"}')
        elif method == "POST":
            body = await _body(receive, endpoints.MAX_OUTCOME_BYTES)
            tenant = callers.from_headers(_headers(scope), engine.config.metadata).tenant
            found = await endpoints.outcome(engine, tenant, body)
        else:
            found = await endpoints.answer(engine, path, scope["query_string"].decode("latin-1"))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(found.body)).encode())]
        await send({"type": "http.response.start", "status": found.status, "headers": headers})
        await send({"type": "http.response.body", "body": found.body})

    def _connect(self, scope: Scope) -> Engine | None:
        """The engine of this process, from its first request on; None on a server without one."""
        client = getattr(scope["app"].state, "engine_client", None) if self._engine is None else None
        if client is not None and not self._is_off:
            try:
                self._authentication = _authentication(scope["app"].state.args)
                self._engine = Engine(client, hello.chats(scope["app"].state))
            except Exception as e:
                self._is_off = True
                logger.error("impala: the middleware failed and is switched off, serving continues", exc_info=e)
        return self._engine

    def _may_enter(self, scope: Scope) -> bool:
        from starlette.datastructures import Headers

        return self._authentication is None or self._authentication.verify_token(Headers(scope=dict(scope)))


def _authentication(args: Any) -> Any:
    """vLLM's own check of API keys, which itself guards /v1 and its like only; None without keys."""
    from vllm import envs
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    tokens = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    return AuthenticationMiddleware(app=None, tokens=tokens) if tokens else None  # type: ignore[arg-type]


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


async def _body(receive: Receive, max_bytes: int) -> bytes:
    """The request's body; cut where it is longer than anything sensible, so that it does not parse."""
    body = b""
    while len(body) <= max_bytes:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or not message.get("more_body", False):
            break
    return body[:max_bytes]


def _reading_along(receive: Receive, caller: Caller, engine: Engine) -> Receive:
    """`receive`, noting the ids in the body once it is complete and before anybody acts on it."""
    parts: list[bytes] = []
    size = 0

    async def receive_and_note() -> Message:
        nonlocal size
        message = await receive()
        if message["type"] == "http.request" and size <= callers.MAX_BODY_BYTES:
            part = message.get("body", b"")
            size += len(part)
            parts.append(part)
            if size > callers.MAX_BODY_BYTES:
                parts.clear()
            elif not message.get("more_body", False):
                callers.add_body(caller, b"".join(parts), engine.config.metadata)
                parts.clear()
        return message

    return receive_and_note

"""The router's HTTP side: routes, start and end. Starlette in front, aiohttp towards the servers, one event loop."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Route

from impala_vllm.fleet.proxy.admin import Admin
from impala_vllm.fleet.proxy.forward import Forward
from impala_vllm.fleet.proxy.gateway import Gateway, RouterOptions
from impala_vllm.fleet.proxy.watch import Receive, Scope, Send

FORWARDED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")


def build(options: RouterOptions, gateway: Gateway | None = None) -> Starlette:
    """The ASGI application; it owns the gateway from start-up to shutdown."""
    site = gateway or Gateway(options)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None, None]:
        async with site:
            yield

    admin = Admin(site)
    return _Site(
        site.forward,
        lifespan=lifespan,
        routes=[
            *(Route(path, site.forward, methods=["POST"]) for path in FORWARDED),  # any other method is refused
            Route("/v1/responses/{response_id}", site.stored, methods=["GET", "DELETE"]),
            Route("/v1/responses/{response_id}/cancel", site.stored, methods=["POST"]),
            Route("/v1/models", admin.models),
            Route("/health", admin.health),
            Route("/metrics", admin.metrics),
            Route("/v1/impala/route", admin.route, methods=["POST"]),
            Route("/v1/impala/servers", admin.list_servers, methods=["GET"]),
            Route("/v1/impala/servers", admin.add_server, methods=["POST"]),
            Route("/v1/impala/servers", admin.remove_server, methods=["DELETE"]),
        ],
    )


class _Site(Starlette):
    """What is forwarded goes past the framework: nothing of it is wanted, and each layer is in every chunk's way."""

    def __init__(self, forward: Forward, **options: Any) -> None:
        super().__init__(**options)
        self._forward = forward

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in FORWARDED:
            await self._forward(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

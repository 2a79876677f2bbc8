"""An app behind the middleware, driven as an ASGI server drives it."""

from types import SimpleNamespace
from typing import Any

from impala_vllm.adapters.vllm.engine import current_caller
from impala_vllm.adapters.vllm.middleware import Middleware
from impala_vllm.config import dump, load
from tests.adapters.vllm.fakes import FakeClient, FakeCore, snapshot

JSON = {"Content-Type": "application/json"}


class Site:
    """An app that remembers what reached it, behind the middleware."""

    def __init__(self, api_keys=(), snapshots=None, chunks=(b"ok",), flags=None):
        self.core = FakeCore([snapshot()] if snapshots is None else snapshots)
        self.client = FakeClient(self.core, dump(load(None, flags)))
        args = SimpleNamespace(api_key=list(api_keys))
        self.app = SimpleNamespace(state=SimpleNamespace(engine_client=self.client, args=args))
        self.middleware = Middleware(self.inner)
        self.chunks = chunks
        self.body: Any = None
        self.caller: Any = None
        self.headers: Any = None
        self.pieces: list[Any] = []

    async def inner(self, scope, receive, send):
        self.headers = dict(scope["headers"])
        self.body = b""
        while scope["type"] == "http":
            message = await receive()
            self.body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.caller = current_caller.get()
        length = str(sum(map(len, self.chunks))).encode()
        headers = [(b"content-type", b"text/plain"), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for i, chunk in enumerate(self.chunks):
            await send({"type": "http.response.body", "body": chunk, "more_body": i + 1 < len(self.chunks)})

    async def request(self, method, path, headers=None, parts=(b"",)):
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
            "app": self.app,
        }
        queue = [
            {"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)
        ]

        async def receive():
            return queue.pop(0)

        async def send(message):
            self.pieces.append(message)

        self.pieces = []
        await self.middleware(scope, receive, send)
        body = b"".join(p.get("body", b"") for p in self.pieces[1:])
        return self.pieces[0]["status"], dict(self.pieces[0]["headers"]), body

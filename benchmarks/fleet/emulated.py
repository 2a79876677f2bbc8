"""A server without a model: OpenAI's API, real KV events, an engine's timing.

Prefill is one queue at the timing's rates, decode steps run side by side, KV is a pool of blocks with LRU eviction from
the tail of chains, as vLLM's. Answers are words of no meaning. Tokens and hashes are `fleet.hashing`'s. What other
routers ask of a vLLM server is answered as vLLM does: /metrics, /tokenize and the render routes.
"""

import argparse
import asyncio
import contextlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from benchmarks.fleet import about
from benchmarks.fleet.pool import Pool
from benchmarks.fleet.publisher import Publisher
from benchmarks.fleet.tokens import tokens_of
from impala_vllm.fleet.hashing import Prompt, Prompts, Scheme, Tokenizer
from impala_vllm.fleet.hashing.scheme import function
from impala_vllm.sim.timing import DEFAULT, Timing, load

SEED = "vllm-none-hash"


@dataclass(slots=True)
class Served:
    """What a server did."""

    requests: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefill_s: float = 0.0
    """On the engine's clock."""


class EmulatedServer:
    """Use as an async context manager; `url` is where it listens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        timing: Timing,
        *,
        speed: float = 1.0,
        block_tokens: int = 16,
        hbm_tokens: int | None = None,
        has_events: bool = True,
        algorithm: str = "sha256",
        host: str = "127.0.0.1",
        port: int = 0,
        tokens_each: int = 1,
        tells_tokens: bool = False,
    ) -> None:
        """`speed`: how much faster than the timing says. `hbm_tokens`: of those that are counted here.

        `tokens_each`: of the timing's that each counted here stands for. `tells_tokens`: events name the tokens of
        their blocks, as vLLM's do; nobody's hashes need them, and it costs tokenising each prompt whole.
        """
        self.served = Served()
        self.scheme = Scheme(algorithm, function(algorithm)(SEED), block_tokens)
        self.prompts = Prompts(self.scheme, tokenizer)
        self._tokenizer = tokenizer
        self.last_headers: dict[str, str] = {}
        self.refuses_with: int | None = None
        """A status to answer every request with."""
        self.hangs_up = 0
        """Requests to come whose connection is closed instead of an answer."""
        self.chats: str | None = None
        """What its handshake says of chats."""
        self.breaks_after: int | None = None
        """Tokens after which an answer is cut off."""
        self._timing = timing
        self._speed = speed
        self._tokens_each = tokens_each
        self._tells_tokens = tells_tokens
        self._hbm_tokens = hbm_tokens or timing.hbm_tokens // tokens_each
        self.pool = Pool(self._hbm_tokens // block_tokens)
        self._prefill = asyncio.Lock()
        self._num_decoding = self._num_waiting = 0
        self._has_events = has_events
        self._host = host
        self._port = port
        self._epoch = uuid.uuid4().hex
        self.publisher: Publisher | None = None
        self.url = ""

    async def __aenter__(self) -> "EmulatedServer":
        self.publisher = Publisher(self._host) if self._has_events else None
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/health", self._health)
        app.router.add_get("/impala/hello", self._hello)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/embeddings", self._embed)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/chat/completions/render", self._render)
        app.router.add_post("/v1/completions/render", self._render)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        await site.start()
        self.url = f"http://{self._host}:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
        if self.publisher is not None:
            await self.publisher.close()

    def word(self, prompt: Prompt, number: int) -> str:
        """A token of an answer; override it where answers are to mean something."""
        return "word "

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "emulated", "object": "model", "parent": None}]})

    async def _hello(self, _: web.Request) -> web.Response:
        return web.json_response(about.hello(self.scheme, self.publisher, self._epoch, self._hbm_tokens, self.chats))

    async def _embed(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": []})

    async def _metrics(self, _: web.Request) -> web.Response:
        running = self._num_decoding + self._prefill.locked()
        return web.Response(text=about.metrics(self.pool.usage, running, self._num_waiting))

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        tokens = await asyncio.to_thread(tokens_of, self._tokenizer, body)
        if tokens is None:
            return web.json_response({"error": "not text"}, status=400)
        return web.json_response({"count": len(tokens), "max_model_len": about.MAX_LEN, "tokens": tokens})

    async def _render(self, request: web.Request) -> web.Response:
        tokens = await asyncio.to_thread(tokens_of, self._tokenizer, await request.json())
        if tokens is None:
            return web.json_response({"error": "not text"}, status=400)
        one = {"request_id": uuid.uuid4().hex, "token_ids": tokens, "sampling_params": {}, "model": "emulated"}
        return web.json_response(one if "/chat/" in request.path else [one])

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        if self.refuses_with is not None:
            return web.json_response({"error": "as told"}, status=self.refuses_with)
        if self.hangs_up:
            self.hangs_up -= 1
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        self.last_headers = {name.lower(): value for name, value in request.headers.items()}
        body = await request.json()
        prompt, tokens = await asyncio.to_thread(self._read, body)
        if prompt is None:
            return web.json_response({"error": "not text"}, status=400)
        self.served.requests += 1
        try:
            cached = await self._compute(prompt, tokens)
            return await self._answer(request, body, prompt, cached)
        except (asyncio.CancelledError, ConnectionResetError):
            self.served.aborted += 1
            raise

    def _read(self, body: Any) -> tuple[Prompt | None, Sequence[int]]:
        if self._tells_tokens:
            tokens = tokens_of(self._tokenizer, body)
            return (self.prompts.of_completion({**body, "prompt": tokens}) if tokens else None), tokens or ()
        return (self.prompts.of_chat if "messages" in body else self.prompts.of_completion)(body), ()

    async def _compute(self, prompt: Prompt, tokens: Sequence[int]) -> int:
        """Prefill; the tokens that were there already."""
        self._num_waiting += 1
        try:
            await self._prefill.acquire()
        finally:
            self._num_waiting -= 1
        try:
            each = self._tokens_each
            cached = min(self.pool.num_held(prompt.keys) * self.scheme.block_tokens, prompt.num_tokens - 1)
            seconds = self._timing.fixed_s + self._timing.prefill_s((prompt.num_tokens - cached) * each, cached * each)
            self.served.prompt_tokens += prompt.num_tokens
            self.served.cached_tokens += cached
            self.served.prefill_s += seconds
            await asyncio.sleep(seconds / self._speed)
            new, gone = self.pool.use(prompt.keys)
            if self.publisher is not None and (new or gone):
                events = self.publisher.stored_chain(prompt.keys, new, tokens)
                await self.publisher.publish(*events, *([self.publisher.removed(gone)] if gone else []))
            return cached
        finally:
            self._prefill.release()

    async def _answer(self, request: web.Request, body: Any, prompt: Prompt, cached: int) -> web.StreamResponse:
        num_tokens = body.get("max_tokens") or 16
        usage = {"prompt_tokens": prompt.num_tokens, "completion_tokens": num_tokens,
                 "prompt_tokens_details": {"cached_tokens": cached}}  # fmt: skip
        if not body.get("stream"):
            await self._decode(num_tokens, prompt.num_tokens)
            text = "".join(self.word(prompt, number) for number in range(num_tokens))
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "text": text}
            return web.json_response({"object": "chat.completion", "choices": [choice], "usage": usage})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number in range(num_tokens):
            if number:
                await self._decode(1, prompt.num_tokens + number)
            if number == self.breaks_after:
                assert request.transport is not None
                request.transport.abort()
                return response
            await response.write(_event({"choices": [{"index": 0, "delta": {"content": self.word(prompt, number)}}]}))
        await response.write(_event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        return response

    async def _decode(self, num_tokens: int, context: int) -> None:
        self._num_decoding += 1
        try:
            each = self._tokens_each
            step_s = self._timing.step_s((), self._num_decoding, self._num_decoding * context * each)
            await asyncio.sleep(num_tokens * each * step_s / self._speed)
        finally:
            self._num_decoding -= 1


def _event(data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


async def _serve(args: argparse.Namespace) -> None:
    server = EmulatedServer(
        Tokenizer(args.tokenizer), load(args.timing), speed=args.speed, hbm_tokens=args.hbm_tokens, port=args.port
    )
    async with server:
        print(server.url, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """Serve until interrupted; the first line printed is the address."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet.emulated", description=main.__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--timing", default=DEFAULT)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--hbm-tokens", type=int)
    parser.add_argument("--port", type=int, default=0)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()

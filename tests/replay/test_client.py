"""One request against a small server that speaks the streaming protocol."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

pytest.importorskip("aiohttp")
from aiohttp import web
from aiohttp.test_utils import TestServer

from impala_vllm.replay.client import Client
from impala_vllm.replay.plan import PlannedTurn

TURN = PlannedTurn("a#0", (5, 6, 7), (8, 2), 0.0)


class Engine:
    """Answers what it is told to and keeps what it was asked."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.status = 200
        self.asked: dict[str, Any] = {}
        self.headers: Mapping[str, str] = {}
        self.breaks_off = False

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked, self.headers = await request.json(), request.headers.copy()
        if self.status != 200:
            return web.Response(status=self.status, text='{"error":\n "too long"}')
        response = web.StreamResponse()
        await response.prepare(request)
        for event in self.events:
            await response.write(f"data: {event}\n\n".encode())
        if self.breaks_off and request.transport is not None:
            request.transport.abort()
        return response


def token(text: str = "x") -> str:
    return json.dumps({"choices": [{"text": text}]})


USAGE = json.dumps({
    "choices": [],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}},
})  # fmt: skip


@pytest.fixture
async def engine() -> AsyncIterator[tuple[Engine, str]]:
    fake = Engine()
    app = web.Application()
    app.router.add_post("/v1/completions", fake.answer)
    async with TestServer(app) as server:
        yield fake, f"http://127.0.0.1:{server.port}"


async def test_a_stream_is_read_to_its_usage(engine: tuple[Engine, str]) -> None:
    fake, url = engine
    fake.events = [token(), token(), USAGE, "[DONE]"]
    async with Client(url, "tiny", salt="s") as client:
        answer = await client.send(TURN, "r-1", "session")
    assert (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens, answer.error) == (3, 2, 1, None)
    assert answer.ttft_s is not None
    assert 0 <= answer.ttft_s <= answer.end_s - answer.start_s
    assert fake.asked["prompt"] == [5, 6, 7]
    assert fake.asked["vllm_xargs"] == {"forced_output": [8, 2]}
    assert (fake.asked["max_tokens"], fake.asked["cache_salt"]) == (2, "s")


async def test_no_session_id_is_sent_unless_asked(engine: tuple[Engine, str]) -> None:
    fake, url = engine
    fake.events = [token(), USAGE]
    async with Client(url, "tiny") as client:
        await client.send(TURN, "r-1", "my-session")
    assert "my-session" not in str(fake.headers) + str(fake.asked)
    assert fake.headers["X-Request-Id"] == "r-1"
    async with Client(url, "tiny", send_session_ids=True) as client:
        await client.send(TURN, "r-2", "my-session")
    assert fake.headers["X-Session-ID"] == "my-session"


async def test_a_refusal_is_a_result_of_one_line(engine: tuple[Engine, str]) -> None:
    fake, url = engine
    fake.status = 400
    async with Client(url, "tiny") as client:
        answer = await client.send(TURN, "r-1", "s")
    assert answer.error == 'HTTP 400: {"error":  "too long"}'
    assert answer.ttft_s is None


async def test_an_error_in_the_stream_is_an_error(engine: tuple[Engine, str]) -> None:
    fake, url = engine
    fake.events = [token(), json.dumps({"error": {"message": "engine died"}})]
    async with Client(url, "tiny") as client:
        answer = await client.send(TURN, "r-1", "s")
    assert answer.error is not None
    assert "engine died" in answer.error


@pytest.mark.parametrize("breaks_off", [False, True])
async def test_a_stream_that_breaks_off_is_an_error(engine: tuple[Engine, str], breaks_off: bool) -> None:
    fake, url = engine
    fake.events, fake.breaks_off = [token()], breaks_off
    async with Client(url, "tiny") as client:
        answer = await client.send(TURN, "r-1", "s")
    assert answer.error is not None


async def test_a_server_that_is_gone_is_an_error() -> None:
    async with Client("http://127.0.0.1:9", "tiny") as client:
        answer = await client.send(TURN, "r-1", "s")
    assert answer.error is not None
    assert answer.first_token_s is None


async def test_every_request_has_a_connection_of_its_own(engine: tuple[Engine, str]) -> None:
    """vLLM closes idle connections after five seconds; one reused at that moment would lose its request."""
    fake, url = engine
    fake.events = [token(), USAGE, "[DONE]"]
    async with Client(url, "tiny") as client:
        for name in ("r-1", "r-2"):
            assert (await client.send(TURN, name, "session")).error is None
            assert fake.headers["Connection"] == "close"

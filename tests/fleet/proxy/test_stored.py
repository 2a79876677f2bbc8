"""Answers that servers keep: what refers to one reaches the server that has it."""

import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks.fleet.serving import serving
from impala_vllm.fleet.addresses import parse_address
from impala_vllm.fleet.places import ServerId
from impala_vllm.fleet.proxy import Gateway, RouterOptions
from impala_vllm.fleet.proxy.stored import Beginning, Stored

A, B = ServerId("http://a"), ServerId("http://b")


def test_the_oldest_are_forgotten_and_what_is_asked_for_is_not_old():
    stored = Stored(max_ids=2)
    stored.note("one", A)
    stored.note("two", B)
    assert stored.home("one") == A
    stored.note("three", B)
    assert (stored.home("one"), stored.home("two"), stored.home("three")) == (A, None, B)


def test_an_id_that_a_client_chose_takes_no_answer_from_its_server():
    stored = Stored()
    stored.note("one", A)
    stored.note("one", B)
    assert stored.home("one") == A


@pytest.mark.parametrize(
    "text",
    [
        '{"id":"resp_1","output":[{"id":"msg_2"}]}',
        'event: response.created\ndata: {"response":{"id": "resp_1","metadata":null},"type":"response.created"}\n\n',
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_id_is_found_in_whatever_pieces_it_comes(text, size):
    stored = Stored()
    beginning = Beginning(stored, A)
    for at in range(0, len(text), size):
        beginning.hear(text[at : at + size].encode())
    assert stored.home("resp_1") == A
    assert stored.home("msg_2") is None


def test_little_of_an_answer_is_looked_at():
    stored = Stored()
    beginning = Beginning(stored, A)
    for _ in range(100):
        beginning.hear(b"x" * 1000)
    beginning.hear(b'"id":"resp_1"')
    assert stored.home("resp_1") is None
    assert beginning._text is None


class Keeper:
    """A server that keeps its answers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kept: list[str] = []
        self.asked: list[str] = []
        self.app = web.Application()
        self.app.router.add_get("/health", self._ok)
        self.app.router.add_post("/v1/responses", self._create)
        self.app.router.add_route("*", "/v1/responses/{id}", self._look)
        self.app.router.add_route("*", "/v1/responses/{id}/cancel", self._look)

    async def _ok(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        previous = body.get("previous_response_id")
        if previous is not None and previous not in self.kept:
            return web.json_response({"error": "not found"}, status=404)
        self.kept.append(f"resp_{self.name}{len(self.kept)}")
        answer = {"id": self.kept[-1], "output": []}
        if body.get("stream"):
            event = {"response": answer, "type": "response.created"}
            return web.Response(text=f"data: {json.dumps(event)}\n\n", content_type="text/event-stream")
        return web.json_response(answer)

    async def _look(self, request: web.Request) -> web.Response:
        self.asked.append(f"{request.method} {request.path_qs}")
        status = 200 if request.match_info["id"] in self.kept else 404
        return web.json_response({"id": request.match_info["id"], "by": self.name}, status=status)


@contextlib.asynccontextmanager
async def keepers() -> AsyncIterator[tuple[str, Gateway, list[Keeper], aiohttp.ClientSession]]:
    async with AsyncExitStack() as stack:
        servers = [Keeper(name) for name in "abc"]
        urls = [str((await stack.enter_async_context(TestServer(s.app))).make_url("")) for s in servers]
        gateway = Gateway(RouterOptions(tuple(parse_address(url) for url in urls)))
        client = await stack.enter_async_context(aiohttp.ClientSession())
        url = await stack.enter_async_context(serving(gateway.options, gateway))
        yield url, gateway, servers, client


async def test_what_refers_to_an_answer_reaches_the_server_that_keeps_it():
    async with keepers() as (url, _, servers, client):

        async def create(**body) -> str:
            async with client.post(url + "/v1/responses", json={"input": "x", **body}) as response:
                assert response.status == 200
                return (await response.text()).partition('"id": "')[2].partition('"')[0]

        firsts = [await create(stream=number % 2 == 0) for number in range(12)]
        assert len({first[5] for first in firsts}) > 1, "all went to one server"
        for first in firsts:
            assert (await create(previous_response_id=first))[5] == first[5]
        for first in firsts[:3]:
            keeper = next(s for s in servers if s.name == first[5])
            for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
                to = f"{url}/v1/responses/{first}{path}?starting_after=3"
                async with client.request(method, to) as response:
                    assert (response.status, (await response.json())["by"]) == (200, first[5])
                assert keeper.asked[-1] == f"{method} /v1/responses/{first}{path}?starting_after=3"


async def test_what_is_not_known_is_one_line():
    async with keepers() as (url, gateway, servers, client):
        async with client.get(url + "/v1/responses/resp_nobody") as response:
            assert response.status == 404
            assert "no such response is known here" in (await response.json())["error"]["message"]
        assert not any(server.asked for server in servers)
        async with client.post(url + "/v1/responses", json={"input": "x"}) as response:
            kept = (await response.json())["id"]
        home = next(iter(gateway.forward._stored._homes.values()))
        assert await gateway.fleet.remove(home)
        async with client.get(f"{url}/v1/responses/{kept}") as response:
            assert response.status == 404


async def test_a_keeper_that_is_down_is_waited_for():
    async with keepers() as (url, gateway, _, client):
        async with client.post(url + "/v1/responses", json={"input": "x"}) as response:
            kept = (await response.json())["id"]
        home = next(iter(gateway.forward._stored._homes.values()))
        for replica, load in gateway.fleet.loads.items():
            load.is_open = replica.server != home
        async with client.post(url + "/v1/responses", json={"input": "y", "previous_response_id": kept}) as response:
            assert response.status == 503
            assert int(response.headers["retry-after"]) > 0

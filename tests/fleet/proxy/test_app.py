"""The router over real HTTP, in front of emulated servers with real KV events."""

import asyncio
import contextlib
import errno
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey

from benchmarks.fleet.emulated import EmulatedServer
from benchmarks.fleet.serving import serving
from impala_vllm.fleet.addresses import parse_address
from impala_vllm.fleet.asking import AskingConfig
from impala_vllm.fleet.fleet import Fleet
from impala_vllm.fleet.proxy import BodyConfig, Gateway, RouterOptions
from impala_vllm.fleet.server import State
from impala_vllm.sim.timing import load

TIMING = load("h100-llama-3.1-8b")
ASKING = AskingConfig(every_s=0.05, details_every_s=0.1)


class Site:
    """A router, its servers, a client."""

    def __init__(
        self, url: str, gateway: Gateway, servers: list[EmulatedServer], client: aiohttp.ClientSession
    ) -> None:
        self.url = url
        self.gateway = gateway
        self.servers = servers
        self.client = client

    async def chat(self, messages, **more) -> tuple[int, str, aiohttp.ClientResponse]:
        body = {"model": "emulated", "messages": messages, "max_tokens": 4, **more}
        async with self.client.post(self.url + "/v1/chat/completions", json=body) as response:
            return response.status, await response.text(), response

    async def json(self, method: str, path: str, **more):
        async with self.client.request(method, self.url + path, **more) as response:
            return response.status, await response.json()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not holds():
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def site(tokenizer, model_dir, num_servers=2, server=None, **options) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        settings = [{"speed": 1e6, **(server or {})}] * num_servers if not isinstance(server, list) else server
        servers = [await stack.enter_async_context(EmulatedServer(tokenizer, TIMING, **s)) for s in settings]
        addresses = tuple(parse_address(s.url) for s in servers)
        gateway = Gateway(RouterOptions(addresses, tokenizer=str(model_dir), asking=ASKING, **options))
        client = await stack.enter_async_context(aiohttp.ClientSession())
        url = await stack.enter_async_context(serving(gateway.options, gateway))
        yield Site(url, gateway, servers, client)


def refusing(fleet: Fleet, url: str, code: int, patch: pytest.MonkeyPatch) -> None:
    """Connections for requests to what begins with `url` fail; those that ask how a server is do not."""
    ask = fleet.session.request
    key = ConnectionKey("127.0.0.1", 1, False, True, None, None, None)

    async def request(method: str, to: str, **more):
        if to.startswith(url):
            raise aiohttp.ClientConnectorError(key, OSError(code, "no"))
        return await ask(method, to, **more)

    patch.setattr(fleet.session, "request", request)


def turns(number: int, trace: str = "one") -> list[dict]:
    messages = [{"role": "system", "content": "You are an agent. " * 200}, {"role": "user", "content": trace * 80}]
    for turn in range(number):
        messages += [{"role": "assistant", "content": f"step {turn} " * 40}, {"role": "user", "content": "go on " * 20}]
    return messages


def cached(text: str) -> int:
    return json.loads(text)["usage"]["prompt_tokens_details"]["cached_tokens"]


def events_of(text: str) -> list:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_a_stream_comes_through_as_it_was_sent(tokenizer, model_dir):
    async with site(tokenizer, model_dir, num_servers=1) as found:
        body = {"model": "emulated", "messages": turns(1), "max_tokens": 6, "stream": True}
        texts = []
        for url in (found.url, found.servers[0].url):
            async with found.client.post(url + "/v1/chat/completions", json=body) as response:
                assert response.headers["content-type"] == "text/event-stream"
                texts.append(await response.text())
        first, again = map(events_of, texts)
        assert first[:-2] == again[:-2]
        assert first[-1] == again[-1] == "[DONE]"


async def test_traces_stay_where_their_prefix_is_and_hit(tokenizer, model_dir):
    async with site(tokenizer, model_dir, num_servers=3) as found:
        for number in range(4):
            for trace in "abcdef":
                status, text, _ = await found.chat(turns(number, trace))
                assert status == 200
                if number:
                    assert cached(text) > 0.6 * json.loads(text)["usage"]["prompt_tokens"]
        served = [s.served for s in found.servers]
        assert sum(s.requests for s in served) == 24
        prompt_tokens, cached_tokens = sum(s.prompt_tokens for s in served), sum(s.cached_tokens for s in served)
        assert cached_tokens / prompt_tokens > 0.7
        assert found.gateway.fleet.index.stats().num_blocks > 100
        assert {load.capacity_tokens for load in found.gateway.fleet.loads.values()} == {TIMING.hbm_tokens}
        counted = {r: load.num_running for r, load in found.gateway.fleet.loads.items()}
        assert set(counted.values()) == {0}


async def test_a_client_that_leaves_ends_the_work(tokenizer, model_dir):
    async with site(tokenizer, model_dir, num_servers=1, server={"speed": 1.0}) as found:
        body = {"messages": turns(0), "max_tokens": 100_000, "stream": True}
        async with found.client.post(found.url + "/v1/chat/completions", json=body) as response:
            await response.content.readany()
        await found.until(lambda: found.servers[0].served.aborted == 1)
        await found.until(lambda: all(not load.num_running for load in found.gateway.fleet.loads.values()))
        assert (await found.chat(turns(0)))[0] == 200


async def test_a_server_that_dies_in_a_stream_is_a_clean_error_and_the_trace_goes_on_elsewhere(tokenizer, model_dir):
    async with site(tokenizer, model_dir) as found:
        for server in found.servers:
            server.breaks_after = 3
        status, text, _ = await found.chat(turns(0), stream=True, max_tokens=10)
        assert status == 200
        *words, error = events_of(text)
        assert len(words) == 3
        assert error["error"]["code"] == 502
        died = next(s for s in found.servers if s.served.requests)
        (other,) = [s for s in found.servers if s is not died]
        other.breaks_after = None
        await died._runner.cleanup()
        status, text, _ = await found.chat(turns(1), stream=True, max_tokens=10)
        assert status == 200
        assert events_of(text)[-1] == "[DONE]"
        assert other.served.requests == 1
        await found.until(lambda: not all(load.is_open for load in found.gateway.fleet.loads.values()))


async def test_before_the_first_byte_another_server_is_tried(tokenizer, model_dir):
    async with site(tokenizer, model_dir, num_servers=3) as found:
        for server in found.servers[:2]:
            server.refuses_with = 503
        for trace in "abcd":
            assert (await found.chat(turns(0, trace)))[0] == 200
        assert found.servers[2].served.requests == 4


async def test_a_server_that_dies_between_head_and_first_byte_costs_no_answer(tokenizer, model_dir):
    asked: list[bytes] = []

    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        is_turn = asked[-1].startswith(b"POST")
        length = b"transfer-encoding: chunked" if is_turn else b"content-length: 0"
        writer.write(b"HTTP/1.1 200 OK\r\n" + length + b"\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with (
        site(tokenizer, model_dir, num_servers=1) as found,
        await asyncio.start_server(die, "127.0.0.1") as dying,
    ):
        fleet = found.gateway.fleet
        host, port = dying.sockets[0].getsockname()
        server = fleet.add(parse_address(f"http://{host}:{port}"))
        await found.until(lambda: server.state is State.UP)
        for replica, load in fleet.loads.items():
            load.pending_s = 0.0 if replica.server == server.id else 1000.0
        assert (await found.chat(turns(0)))[0] == 200
        assert any(head.startswith(b"POST") for head in asked)
        assert found.servers[0].served.requests == 1


async def test_as_many_are_tried_as_are_open_though_one_has_just_been_found_dead(tokenizer, model_dir, monkeypatch):
    async with site(tokenizer, model_dir, num_servers=3) as found:
        dead, busy, well = found.servers
        busy.refuses_with = 503
        fleet = found.gateway.fleet
        for replica, load in fleet.loads.items():
            load.pending_s = 1000.0 * [s.url for s in found.servers].index(replica.server)
        refusing(fleet, dead.url, errno.ECONNREFUSED, monkeypatch)
        assert (await found.chat(turns(0)))[0] == 200
        assert well.served.requests == 1


async def test_a_router_out_of_descriptors_closes_no_server(tokenizer, model_dir, monkeypatch):
    async with site(tokenizer, model_dir) as found:
        fleet = found.gateway.fleet
        with monkeypatch.context() as patch:
            refusing(fleet, "http://", errno.EMFILE, patch)
            status, _, response = await found.chat(turns(0))
            assert status == 502
            assert int(response.headers["retry-after"]) > 0
            assert all(server.state is State.UP for server in fleet.servers.values())
        assert (await found.chat(turns(0)))[0] == 200


async def test_a_connection_that_was_closed_when_idle_is_not_held_against_its_server(tokenizer, model_dir):
    async with site(tokenizer, model_dir, num_servers=1) as found:
        found.servers[0].hangs_up = 1
        assert (await found.chat(turns(0)))[0] == 200
        found.servers[0].hangs_up = 2
        assert (await found.chat(turns(0)))[0] == 502


async def test_where_all_are_busy_the_client_is_told_when_to_come_back(tokenizer, model_dir):
    async with site(tokenizer, model_dir) as found:
        for server in found.servers:
            server.refuses_with = 429
        status, text, response = await found.chat(turns(0))
        assert status == 429
        assert json.loads(text) == {"error": "as told"}
        assert int(response.headers["retry-after"]) > 0
        for address in list(found.gateway.fleet.servers):
            await found.gateway.fleet.remove(address)
        status, _, response = await found.chat(turns(0))
        assert status == 503
        assert int(response.headers["retry-after"]) > 0


async def test_only_streams_that_succeed_say_what_prefill_costs(tokenizer, model_dir):
    async with site(tokenizer, model_dir, num_servers=1) as found:
        cost = found.gateway.router.policy.cost
        before = cost.prefill_s(1000)
        assert (await found.chat(turns(0)))[0] == 200
        for code in (400, 429):
            found.servers[0].refuses_with = code
            assert (await found.chat(turns(1), stream=True))[0] == code
        assert cost.prefill_s(1000) == before
        assert all(not load.pending_s for load in found.gateway.fleet.loads.values())
        found.servers[0].refuses_with = None
        assert (await found.chat(turns(4), stream=True))[0] == 200
        assert cost.prefill_s(1000) != before


async def test_what_is_too_large_too_much_or_too_slow_is_refused_in_words(tokenizer, model_dir):
    limits = BodyConfig(max_bytes=20_000, max_held_bytes=30_000, silence_s=2.0)
    async with site(tokenizer, model_dir, num_servers=1, bodies=limits) as found:
        assert (await found.chat([{"role": "user", "content": "x" * 30_000}]))[0] == 413
        found.gateway.bodies.held_bytes += 20_000
        status, text, response = await found.chat([{"role": "user", "content": "x" * 15_000}])
        assert (status, json.loads(text)["error"]["type"]) == (503, "router_error")
        assert int(response.headers["retry-after"]) > 0
        found.gateway.bodies.held_bytes -= 20_000

        async def slow():
            yield b"{"
            await asyncio.sleep(1000)

        for path in ("/v1/chat/completions", "/v1/impala/route"):
            headers = {"content-type": "application/json"}
            async with found.client.post(found.url + path, data=slow(), headers=headers) as response:
                assert response.status == 408
        assert (await found.chat(turns(0)))[0] == 200
        assert found.gateway.bodies.held_bytes == 0
        async with found.client.get(found.url + "/metrics") as response:
            counted = await response.text()
        assert "impala_router_refused_total 0.0" in counted
        for status, number in (("413", 1.0), ("503", 1.0), ("408", 2.0)):
            assert f'impala_router_refused_bodies_total{{status="{status}"}} {number}' in counted


async def test_a_body_is_let_go_of_when_the_answer_begins(tokenizer, model_dir):
    async with site(tokenizer, model_dir, num_servers=1, server={"speed": 1.0}) as found:
        body = {"messages": turns(0), "max_tokens": 100_000, "stream": True}
        async with found.client.post(found.url + "/v1/chat/completions", json=body) as response:
            await response.content.readany()
            assert found.gateway.bodies.held_bytes == 0


async def test_servers_come_and_go_while_requests_run(tokenizer, model_dir):
    async with site(tokenizer, model_dir, num_servers=2, server={"speed": 20.0}, drain_s=60.0) as found:
        await found.chat(turns(0))
        home = next(s for s in found.servers if s.served.requests)
        (other,) = [s for s in found.servers if s is not home]
        running = asyncio.create_task(found.chat(turns(1), stream=True, max_tokens=200))
        await found.until(lambda: any(load.num_running for load in found.gateway.fleet.loads.values()))
        status, body = await found.json("DELETE", f"/v1/impala/servers?url={home.url}")
        assert (status, body) == (200, {"removed": home.url})
        assert home.served.aborted == 0  # it was waited for
        assert events_of((await running)[1])[-1] == "[DONE]"
        assert (await found.chat(turns(2)))[0] == 200
        assert other.served.requests == 1
        status, body = await found.json("POST", "/v1/impala/servers", json={"url": home.url})
        assert status == 201
        await found.until(lambda: sum(load.is_open for load in found.gateway.fleet.loads.values()) == 2)
        _, body = await found.json("GET", "/v1/impala/servers")
        assert [s["hashes"] for s in body["servers"]] == ["ok", "ok"]
        status, body = await found.json("DELETE", "/v1/impala/servers?url=http://nobody")
        assert status == 404
        status, body = await found.json("POST", "/v1/impala/servers", json={"url": "nobody"})
        assert status == 400
        assert "write http://HOST:PORT" in body["error"]


async def test_a_route_is_explained_and_nothing_is_sent(tokenizer, model_dir):
    async with site(tokenizer, model_dir) as found:
        await found.chat(turns(1))
        home = next(s for s in found.servers if s.served.requests)
        replica = next(r for r in found.gateway.fleet.loads if r.server == home.url)
        await found.until(lambda: found.gateway.fleet.servers[replica.server].has_events(replica))
        status, body = await found.json("POST", "/v1/impala/route", json={"messages": turns(2), "model": "emulated"})
        assert status == 200
        assert body["server"] == home.url
        assert body["is_hashed"]
        assert body["cached_tokens"] > 300
        assert {p["server"] for p in body["prices"]} == {s.url for s in found.servers}
        assert set(body["prices"][0]) >= {"prefill_s", "transfer_s", "queue_s", "harm_s", "credit_s", "total_s"}
        assert sum(s.served.requests for s in found.servers) == 1


async def test_a_server_that_hashes_otherwise_is_named_and_still_serves(tokenizer, model_dir, caplog):
    caplog.set_level(logging.WARNING)
    servers = [{"speed": 1e6}, {"speed": 1e6, "algorithm": "sha256_cbor"}, {"speed": 1e6, "has_events": False}]
    async with site(tokenizer, model_dir, server=servers) as found:
        await found.until(lambda: all(s.hello for s in found.gateway.fleet.servers.values()))
        _, body = await found.json("GET", "/v1/impala/servers")
        hashes = [s["hashes"] for s in body["servers"]]
        # Whoever answered first is right; the one with another algorithm is alone with it.
        assert sorted("set the same --prefix-caching-hash-algo" in h for h in hashes)[1:] in (
            [False, True],
            [True, True],
        )
        assert "ok" in hashes
        assert any("events are off" in s["events"] for s in body["servers"])
        for trace in "abcdefgh":
            assert (await found.chat(turns(0, trace)))[0] == 200
        assert "set the same --prefix-caching-hash-algo" in caplog.text


async def test_nothing_of_a_prompt_is_logged(tokenizer, model_dir, caplog):
    caplog.set_level(logging.DEBUG)
    async with site(tokenizer, model_dir, explains=True) as found:
        _, _, response = await found.chat([{"role": "user", "content": "sesame " * 200}])
        assert "x-impala-decision" in response.headers
        await found.chat([{"role": "user", "content": [{"type": "sesame"}]}])
        async with found.client.post(found.url + "/v1/chat/completions", data=b'{"sesame') as response:
            assert response.status >= 400
    assert "tokens in reach" in caplog.text
    assert "sesame" not in caplog.text


async def test_health_models_and_metrics(tokenizer, model_dir):
    async with site(tokenizer, model_dir) as found:
        await found.chat(turns(0))
        assert (await found.json("GET", "/health")) == (200, {"status": "ok", "open": 2, "known": 2})
        _, models = await found.json("GET", "/v1/models")
        assert [card["id"] for card in models["data"]] == ["emulated"]
        async with found.client.get(found.url + "/metrics") as response:
            text = await response.text()
        assert "impala_router_turns_total{reason=" in text
        assert f'impala_router_server_up{{server="{found.servers[0].url}"}} 1.0' in text
        async with found.client.post(found.url + "/v1/embeddings", json={"input": "x"}) as response:
            assert response.status == 200


async def test_routes_that_change_the_fleet_want_the_key(tokenizer, model_dir):
    async with site(tokenizer, model_dir, num_servers=1, admin_key="secret") as found:
        for method, path in (("GET", "/v1/impala/servers"), ("POST", "/v1/impala/route")):
            assert (await found.json(method, path, json={}))[0] == 403
        found_status, _ = await found.json("GET", "/v1/impala/servers", headers={"authorization": "Bearer secret"})
        assert found_status == 200


async def test_what_comes_through_a_proxy_wants_the_key(tokenizer, model_dir):
    path = "/v1/impala/servers"
    async with site(tokenizer, model_dir, num_servers=1) as found:
        for name in ("Forwarded", "X-Forwarded-For", "X-Forwarded-Proto", "X-Real-IP", "Via"):
            status, body = await found.json("GET", path, headers={name: "127.0.0.1"})
            assert (status, body) == (403, {"error": "not through a proxy without --admin-key"})
        assert (await found.json("GET", path))[0] == 200
    async with site(tokenizer, model_dir, num_servers=1, admin_key="secret") as found:
        headers = {"x-forwarded-for": "127.0.0.1"}
        assert (await found.json("GET", path, headers=headers))[0] == 403
        assert (await found.json("GET", path, headers={**headers, "authorization": "Bearer secret"}))[0] == 200


async def test_pages_of_other_sites_change_nothing(tokenizer, model_dir):
    async with site(tokenizer, model_dir, num_servers=1) as found:
        path, host = "/v1/impala/servers", found.url.removeprefix("http://")
        added, port = {"url": "http://127.0.0.1:9"}, host.partition(":")[2]

        async def asked(headers: dict[str, str]) -> int:
            return (await found.json("POST", path, data=json.dumps(added), headers=headers))[0]

        assert await asked({"content-type": "text/plain"}) == 415
        kind = {"content-type": "application/json; charset=utf-8"}
        for origin in ("https://elsewhere.example", "http://localhost:1", "null", "http://["):
            assert await asked({**kind, "origin": origin}) == 403
        rebound = f"elsewhere.example:{port}"  # a name that leads to this machine
        assert await asked({**kind, "origin": f"http://{rebound}", "host": rebound}) == 403
        removal = f"{path}?url={found.servers[0].url}"
        assert (await found.json("DELETE", removal, headers={"origin": "http://elsewhere.example"}))[0] == 403
        assert list(found.gateway.fleet.servers) == [found.servers[0].url]
        assert await asked({**kind, "origin": found.url}) == 201


async def test_a_server_of_the_file_is_let_go_by_the_file(tokenizer, model_dir, tmp_path):
    path = tmp_path / "workers"
    async with site(tokenizer, model_dir, num_servers=2, workers_file=path) as found:
        path.write_text(found.servers[0].url)
        await found.until(lambda: bool(found.gateway.fleet.listed))
        status, body = await found.json("DELETE", f"/v1/impala/servers?url={found.servers[0].url}")
        assert status == 409
        assert str(path) in body["error"]


async def test_a_server_that_is_added_again_is_followed_where_it_is_said_to_publish(tokenizer, model_dir, tmp_path):
    path = tmp_path / "workers"
    async with site(tokenizer, model_dir, num_servers=2, workers_file=path) as found:
        path.write_text(found.servers[0].url)
        await found.until(lambda: bool(found.gateway.fleet.listed))
        listed, free = (found.gateway.fleet.servers[s.url] for s in found.servers)
        moved = {"url": free.id, "kv_events": "tcp://127.0.0.1:7"}
        assert (await found.json("POST", "/v1/impala/servers", json=moved))[0] == 200
        await found.until(lambda: "no replay endpoint" in (free.feeds.problem or ""))
        assert (await found.json("POST", "/v1/impala/servers", json={"url": free.id}))[0] == 200
        assert free.address.events is not None
        status, body = await found.json("POST", "/v1/impala/servers", json={**moved, "url": listed.id})
        assert status == 409
        assert str(path) in body["error"]
        assert (await found.json("POST", "/v1/impala/servers", json={"url": listed.id}))[0] == 200


async def test_a_key_of_the_client_reaches_the_server(tokenizer, model_dir):
    async with site(tokenizer, model_dir, num_servers=1) as found:
        body = {"messages": turns(0), "max_tokens": 1}
        headers = {"authorization": "Bearer k", "x-session-id": "s", "x-name": "né"}
        async with found.client.post(found.url + "/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status == 200
            assert len(response.headers.getall("date")) == len(response.headers.getall("server")) == 1
        seen = found.servers[0].last_headers
        assert seen["authorization"] == "Bearer k"
        assert seen["x-session-id"] == "s"
        assert seen["x-name"] == "né"


async def test_what_no_tokenizer_takes_is_left_to_the_engine(tokenizer, model_dir):
    async with site(tokenizer, model_dir, num_servers=1) as found:
        for body in (b'{"prompt": "\\ud800"}', b"[]", b'{"prompt": 7}', b"\xff", b'{"prompt": {}, "stream": 3}'):
            async with found.client.post(found.url + "/v1/completions", data=body) as response:
                assert response.status >= 400
        assert (await found.chat(turns(0)))[0] == 200
        assert all(not load.num_running for load in found.gateway.fleet.loads.values())


@pytest.mark.parametrize("bad", ["", "host:8000", "http://", "http://h=tcp://*:1", "http://h=nothing"])
def test_what_is_no_address_is_refused(bad):
    with pytest.raises(ValueError, match="write"):
        parse_address(bad)

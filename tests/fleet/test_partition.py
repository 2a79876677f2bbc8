"""A router parted from its servers: what it can hear no longer, and what it knows once the network is back.

By a cable of our own, which any machine has; `test_namespaces` pulls a real one where that is allowed.
"""

import asyncio
import json
from urllib.parse import urlsplit

import aiohttp

from benchmarks.fleet.emulated import EmulatedServer
from benchmarks.fleet.serving import serving
from impala_vllm.fleet.addresses import parse_address
from impala_vllm.fleet.asking import AskingConfig
from impala_vllm.fleet.events import Endpoints, feed
from impala_vllm.fleet.places import Replica, ServerId
from impala_vllm.fleet.proxy import Gateway, RouterOptions
from impala_vllm.sim.timing import load
from tests.fleet.cable import Cable

TIMING = load("h100-llama-3.1-8b")
ASKING = AskingConfig(every_s=0.05, details_every_s=0.1, within_s=1.0, silence_s=2.0)


def body(name: str) -> dict:
    return {"model": "emulated", "messages": [{"role": "user", "content": f"{name} " * 900}], "max_tokens": 1}


def port_of(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


async def reach(client: aiohttp.ClientSession, url: str, name: str) -> int:
    """Tokens of that prompt which the router believes to be in reach."""
    async with client.post(url + "/v1/impala/route", json=body(name)) as response:
        return (await response.json())["cached_tokens"]


async def reached(client: aiohttp.ClientSession, url: str, name: str) -> None:
    async with asyncio.timeout(100):
        while await reach(client, url, name) < 500:
            await asyncio.sleep(0.02)


async def ask(client: aiohttp.ClientSession, url: str, name: str) -> None:
    async with client.post(url + "/v1/chat/completions", json=body(name)) as response:
        assert response.status == 200
        assert await response.json()


async def test_events_of_a_partition_are_known_after_it_though_no_connection_outlived_it(tokenizer, model_dir):
    async with EmulatedServer(tokenizer, TIMING, speed=1e6) as server, aiohttp.ClientSession() as client:
        assert server.publisher is not None
        publisher = server.publisher
        async with (
            Cable(port_of(publisher.endpoint)) as events,
            Cable(port_of(publisher.replay_endpoint)) as replays,
        ):
            parted = Endpoints(f"tcp://127.0.0.1:{events.port}", f"tcp://127.0.0.1:{replays.port}")
            address = parse_address(server.url)._replace(events=parted)
            options = RouterOptions((address,), tokenizer=str(model_dir), asking=ASKING)
            async with serving(options) as url:
                await ask(client, server.url, "before")
                await reached(client, url, "before")
                for cable in (events, replays):
                    cable.cut()
                await ask(client, server.url, "meanwhile")
                assert not await reach(client, url, "meanwhile")
                await ask(client, url, "through")  # the servers themselves are there
                for cable in (events, replays):
                    cable.mend(forgets=True)
                await reached(client, url, "meanwhile")
                await reached(client, url, "before")
                await ask(client, server.url, "after")
                await reached(client, url, "after")


async def test_a_server_whose_events_alone_are_cut_off_is_open_and_not_believed_for_long(
    tokenizer, model_dir, monkeypatch
):
    async with EmulatedServer(tokenizer, TIMING, speed=1e6) as server, aiohttp.ClientSession() as client:
        assert server.publisher is not None
        publisher, replica = server.publisher, Replica(ServerId(server.url))
        async with Cable(port_of(publisher.endpoint)) as events:
            parted = Endpoints(f"tcp://127.0.0.1:{events.port}", publisher.replay_endpoint)
            address = parse_address(server.url)._replace(events=parted)
            gateway = Gateway(RouterOptions((address,), tokenizer=str(model_dir), asking=ASKING))
            async with serving(gateway.options, gateway) as url, asyncio.timeout(100):
                await ask(client, server.url, "before")
                await reached(client, url, "before")
                while not gateway.fleet.has_events(replica):
                    await asyncio.sleep(0.02)
                events.cut()
                while gateway.fleet.has_events(replica):
                    await asyncio.sleep(0.02)
                assert await reach(client, url, "before") > 500
                await ask(client, url, "through")  # no event will tell of it: what was sent there is believed
                assert await reach(client, url, "through") > 500
                monkeypatch.setattr(feed, "UNSURE_S", 0.0)
                while await reach(client, url, "before"):
                    await asyncio.sleep(0.02)
                assert gateway.fleet.loads[replica].is_open
                assert not gateway.fleet.sources()[replica].is_heard  # another router may tell of it
                events.mend(forgets=True)
                await reached(client, url, "before")
                while not gateway.fleet.has_events(replica):
                    await asyncio.sleep(0.02)


async def test_a_server_that_could_not_be_reached_is_known_as_before(tokenizer, model_dir):
    async with (
        EmulatedServer(tokenizer, TIMING, speed=1e6) as parted,
        EmulatedServer(tokenizer, TIMING, speed=1e6) as near,
        aiohttp.ClientSession() as client,
        Cable(port_of(parted.url)) as cable,
    ):
        through = ServerId(f"http://127.0.0.1:{cable.port}")
        addresses = (parse_address(through), parse_address(near.url))
        gateway = Gateway(RouterOptions(addresses, tokenizer=str(model_dir), asking=ASKING))
        async with serving(gateway.options, gateway) as url:
            await ask(client, parted.url, "old")
            await reached(client, url, "old")
            load_of = gateway.fleet.loads[Replica(through)]
            cable.cut()
            async with asyncio.timeout(100):
                while load_of.is_open:
                    await asyncio.sleep(0.02)
            assert not await reach(client, url, "old")
            await ask(client, url, "old")  # nobody waits for the one that is gone
            assert near.served.requests == 1
            cable.mend()
            keys = (await gateway.reader.read("/v1/chat/completions", {}, json.dumps(body("old")).encode())).turn.prompt
            assert keys is not None
            async with asyncio.timeout(100):
                while gateway.fleet.index.num_replicas(keys.keys[-1]) < 2:
                    await asyncio.sleep(0.02)
            assert load_of.is_open


async def test_requests_that_wait_for_a_server_that_was_cut_off_are_served_elsewhere_and_streams_end(
    tokenizer, model_dir
):
    async with (
        EmulatedServer(tokenizer, TIMING, speed=1e-5) as waits,
        EmulatedServer(tokenizer, TIMING) as streams,
        EmulatedServer(tokenizer, TIMING, speed=1e6) as near,
        aiohttp.ClientSession() as client,
        Cable(port_of(waits.url)) as to_waits,
        Cable(port_of(streams.url)) as to_streams,
    ):
        parted = [ServerId(f"http://127.0.0.1:{cable.port}") for cable in (to_waits, to_streams)]
        gateway = Gateway(RouterOptions((parse_address(parted[1]),), tokenizer=str(model_dir), asking=ASKING))
        async with serving(gateway.options, gateway) as url:
            asked = {**body("begun"), "max_tokens": 100_000, "stream": True}
            async with client.post(url + "/v1/chat/completions", json=asked) as begun:
                await begun.content.readline()
                gateway.fleet.add(parse_address(parted[0]))
                await gateway.fleet.settled()
                gateway.fleet.loads[Replica(parted[1])].pending_s = 1000.0
                waiting = asyncio.create_task(ask(client, url, "waiting"))
                async with asyncio.timeout(100):
                    while not waits.served.requests:
                        await asyncio.sleep(0.02)
                gateway.fleet.add(parse_address(near.url))
                await gateway.fleet.settled()
                for cable in (to_waits, to_streams):
                    cable.cut()
                async with asyncio.timeout(100):
                    await waiting
                    rest = await begun.text()
            assert json.loads(rest.strip().splitlines()[-1].removeprefix("data: "))["error"]["code"] == 502
            assert near.served.requests == 1
        for cable in (to_waits, to_streams):
            cable.mend()

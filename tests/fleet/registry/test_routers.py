"""Two routers in front of the same servers, one of which cannot reach their events."""

import asyncio
import json

import aiohttp

from benchmarks.fleet.emulated import EmulatedServer
from benchmarks.fleet.serving import serving
from impala_vllm.fleet.addresses import parse_address
from impala_vllm.fleet.asking import AskingConfig
from impala_vllm.fleet.events import Endpoints
from impala_vllm.fleet.proxy import Gateway, RouterOptions
from impala_vllm.fleet.registry import RegistryConfig
from impala_vllm.sim.timing import load

ASKING = AskingConfig(every_s=0.05, details_every_s=0.1, within_s=60.0)
NOWHERE = Endpoints("tcp://127.0.0.1:1", "tcp://127.0.0.1:1")


async def test_a_router_without_events_finds_the_prefix_and_goes_on_without_redis(tokenizer, model_dir, redis_server):
    timing = load("h100-llama-3.1-8b")
    settings = {
        "tokenizer": str(model_dir),
        "asking": ASKING,
        "registry": redis_server.url,
        "sharing": RegistryConfig(every_s=0.1, claim_s=0.1, lease_s=600.0, within_s=60.0),
    }
    body = {"model": "emulated", "messages": [{"role": "user", "content": "sesame " * 900}], "max_tokens": 1}
    async with (
        EmulatedServer(tokenizer, timing, speed=1e6) as first,
        EmulatedServer(tokenizer, timing, speed=1e6) as second,
        aiohttp.ClientSession() as client,
    ):
        addresses = tuple(parse_address(server.url) for server in (first, second))
        deaf = Gateway(RouterOptions(tuple(a._replace(events=NOWHERE) for a in addresses), **settings))
        async with serving(RouterOptions(addresses, **settings)) as hears, serving(deaf.options, deaf) as url:
            async with client.post(hears + "/v1/chat/completions", json=body) as response:
                assert response.status == 200
            async with asyncio.timeout(120):
                while not deaf.fleet.index.stats().num_blocks:
                    await asyncio.sleep(0.02)
            async with client.post(url + "/v1/impala/route", json=body) as response:
                decided = await response.json()
            home = first if first.served.requests else second
            assert decided["server"] == home.url
            assert decided["cached_tokens"] > 500
            redis_server.kill()
            async with asyncio.timeout(120):
                while deaf.registry is None or deaf.registry.problem is None:
                    await asyncio.sleep(0.02)
            async with client.post(url + "/v1/chat/completions", json=body) as response:
                assert response.status == 200
                assert json.loads(await response.text())["usage"]["prompt_tokens_details"]["cached_tokens"] > 500
            async with client.get(url + "/health") as response:
                found = await response.json()
            assert (response.status, found["status"]) == (200, "ok")
            assert found["registry"] != "ok"
            async with client.get(url + "/metrics") as response:
                text = await response.text()
            assert "impala_router_registry_up 0.0" in text
            assert "sesame" not in text
            redis_server.start()
            async with asyncio.timeout(120):
                while deaf.registry.problem is not None or not deaf.registry.index.heard:
                    await asyncio.sleep(0.02)

"""What routers other than ours ask of a vLLM server, asked of an emulated one."""

import aiohttp

from benchmarks.fleet.emulated import EmulatedServer
from impala_vllm.sim.timing import load

TIMING = load("h100-llama-3.1-8b")
BODY = {"model": "emulated", "messages": [{"role": "user", "content": "open the file " * 60}], "max_tokens": 1}


async def test_rendered_tokens_are_those_its_keys_are_of(tokenizer):
    async with EmulatedServer(tokenizer, TIMING, speed=1e6) as server, aiohttp.ClientSession() as client:
        async with client.post(server.url + "/v1/chat/completions/render", json=BODY) as response:
            tokens = (await response.json())["token_ids"]
        async with client.post(server.url + "/tokenize", json=BODY) as response:
            assert (await response.json())["tokens"] == tokens
        prompt = server.prompts.of_chat(BODY)
        assert prompt is not None
        assert list(server.scheme.chain(tokens).keys) == list(prompt.keys)


async def test_events_that_name_tokens_change_no_hash(tokenizer):
    server = EmulatedServer(tokenizer, TIMING, speed=1e6, tells_tokens=True)
    async with server, aiohttp.ClientSession() as client:
        for cached in (False, True):
            async with client.post(server.url + "/v1/chat/completions", json=BODY) as response:
                usage = (await response.json())["usage"]
            assert bool(usage["prompt_tokens_details"]["cached_tokens"]) is cached
        prompt = server.prompts.of_chat(BODY)
        assert prompt is not None
        assert usage["prompt_tokens"] == prompt.num_tokens
        async with client.get(server.url + "/metrics") as response:
            lines = dict(line.rsplit(" ", 1) for line in (await response.text()).splitlines())
    assert float(lines['vllm:kv_cache_usage_perc{engine="0",model_name="emulated"}']) > 0
    assert lines['vllm:num_requests_waiting{engine="0",model_name="emulated"}'] == "0"


async def test_a_token_that_stands_for_many_takes_their_time(tokenizer):
    times = []
    for each in (1, 8):
        server = EmulatedServer(tokenizer, TIMING, speed=1e6, tokens_each=each)
        async with server, aiohttp.ClientSession() as client:
            response = await client.post(server.url + "/v1/chat/completions", json=BODY)
            tokens = (await response.json())["usage"]["prompt_tokens"]
        assert server.served.prefill_s == TIMING.fixed_s + TIMING.prefill_s(tokens * each, 0)
        times.append(server.served.prefill_s)
    assert times[1] > 2 * times[0]

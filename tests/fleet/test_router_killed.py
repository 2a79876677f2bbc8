"""`impala router` as a process that is killed with streams open, and started again."""

import asyncio
import json
import os
import socket
import sys

import aiohttp
import pytest

from benchmarks.fleet.emulated import EmulatedServer
from impala_vllm.sim.timing import load

TIMING = load("h100-llama-3.1-8b")
RUN = "from impala_vllm.cli.main import main; main()"


def turns(number: int, trace: int) -> list[dict]:
    messages = [{"role": "user", "content": f"trace {trace} " * 300}]
    for turn in range(number):
        messages += [{"role": "assistant", "content": f"step {turn} " * 40}, {"role": "user", "content": "go on " * 20}]
    return messages


class RouterProcess:
    """Started again and again at one address."""

    def __init__(self, servers: list[EmulatedServer], tokenizer: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        workers = [word for server in servers for word in ("--worker", server.url)]
        self._command = [
            sys.executable,
            "-c",
            RUN,
            "router",
            *workers,
            "--tokenizer",
            tokenizer,
            "--port",
            str(self.port),
        ]

    async def start(self, client: aiohttp.ClientSession, num_servers: int) -> None:
        """Returns once it has read all that its servers hold, and can hash what it is asked."""
        env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = await asyncio.create_subprocess_exec(*self._command, env=env)
        async with asyncio.timeout(200):
            while await self._num_known(client) < num_servers:
                assert self._process.returncode is None
                await asyncio.sleep(0.05)

    async def kill(self) -> None:
        """As by kill -9."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _num_known(self, client: aiohttp.ClientSession) -> int:
        try:
            async with client.get(self.url + "/v1/impala/servers") as response:
                servers = (await response.json())["servers"]
            body = {"model": "emulated", "messages": turns(0, 0)}
            async with client.post(self.url + "/v1/impala/route", json=body) as response:
                if not (await response.json()).get("is_hashed"):
                    return 0
        except aiohttp.ClientError:
            return 0
        return sum(rank["knowledge"] == "all" for server in servers for rank in server["ranks"])


async def test_streams_of_a_killed_router_end_as_broken_and_their_traces_go_on_where_their_prefix_is(
    tokenizer, model_dir
):
    async with (
        EmulatedServer(tokenizer, TIMING) as first,
        EmulatedServer(tokenizer, TIMING) as second,
        aiohttp.ClientSession() as client,
    ):
        servers = [first, second]
        for number, server in enumerate(servers):  # so that there is something to know of each
            body = {"model": "emulated", "messages": turns(0, 90 + number), "max_tokens": 1}
            async with client.post(server.url + "/v1/chat/completions", json=body) as response:
                assert response.status == 200
        router = RouterProcess(servers, str(model_dir))
        await router.start(client, 2)
        try:
            bodies = [
                {"model": "emulated", "messages": turns(0, trace), "max_tokens": 100_000, "stream": True}
                for trace in range(4)
            ]
            streams = [await client.post(router.url + "/v1/chat/completions", json=body) for body in bodies]
            for stream in streams:
                assert (await stream.content.readany()).startswith(b"data: ")
            await router.kill()
            for stream in streams:
                with pytest.raises(aiohttp.ClientError):  # never taken for whole
                    await stream.read()
            async with asyncio.timeout(100):
                while sum(server.served.aborted for server in servers) < 4:  # nobody computes for a client that is gone
                    await asyncio.sleep(0.02)
            await router.start(client, 2)
            for trace in range(4):
                body = {"model": "emulated", "messages": turns(1, trace), "max_tokens": 1}
                async with client.post(router.url + "/v1/chat/completions", json=body) as response:
                    usage = json.loads(await response.text())["usage"]
                assert usage["prompt_tokens_details"]["cached_tokens"] > 0.6 * usage["prompt_tokens"]
        finally:
            await router.kill()

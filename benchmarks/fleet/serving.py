"""A router that serves in this process, for tests and benchmarks."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator

import uvicorn

from impala_vllm.fleet.proxy import Gateway, RouterOptions, build


@contextlib.asynccontextmanager
async def serving(options: RouterOptions, gateway: Gateway | None = None) -> AsyncGenerator[str, None]:
    """Its address, once all its servers are open and tokenizers are loaded."""
    site = gateway or Gateway(options)
    # With the protocol named, or asyncio leaves Nagle's algorithm on: 40 ms for whoever writes twice.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(build(options, site), log_level="warning", access_log=False)
    running = uvicorn.Server(config)
    task = asyncio.create_task(running.serve([listener]))
    async with asyncio.timeout(120):
        while not running.started:
            await asyncio.sleep(0.01)
        await site.fleet.settled()
        while not all(load.is_open for load in site.fleet.loads.values()):
            await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        await task

"""Who may end a request: its client, and whoever runs the server."""

import asyncio

import pytest

from impala_vllm.fleet.proxy.watch import Watch


class Client:
    """Leaves when told."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()

    async def receive(self):
        await self.leaves.wait()
        return {"type": "http.disconnect"}


async def serve(client: Client, does) -> bool:
    with Watch(client.receive) as watch:
        await does
    return watch.has_left


async def test_a_client_that_leaves_ends_the_work_and_nothing_else():
    client = Client()
    serving = asyncio.create_task(serve(client, asyncio.Event().wait()))
    await asyncio.sleep(0)
    client.leaves.set()
    assert await serving
    assert not serving.cancelling()


async def test_another_cancelling_goes_on():
    serving = asyncio.create_task(serve(Client(), asyncio.Event().wait()))
    await asyncio.sleep(0)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving


async def test_a_client_that_leaves_after_the_end_cancels_nothing():
    client = Client()

    async def ends() -> None:
        await asyncio.sleep(0)
        client.leaves.set()

    assert not await serve(client, ends())
    for _ in range(5):
        await asyncio.sleep(0)  # would be cancelled here

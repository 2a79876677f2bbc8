"""Agents that send their sessions to a fleet, turn by turn, and how long they wait for it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random
from types import MappingProxyType

import aiohttp

from benchmarks.fleet.chats import Ask

Pick = Callable[[int], str]
"""The address for a turn of the session of that number."""
PATIENCE_S = 600.0
EMULATED: Mapping[str, str] = MappingProxyType({"model": "emulated"})


@dataclass(frozen=True, slots=True)
class Load:
    """When sessions begin."""

    spread_s: float
    """Within so many seconds."""
    concurrency: int | None = None
    """Closed loop: so many live at a time, the next begins when one ends; None: all of them."""


@dataclass(slots=True)
class Waited:
    """What became of the sessions."""

    makespan_s: float = 0.0
    stalls_s: list[float] = field(default_factory=list[float])
    """Of each session, what it waited for answers."""
    num_failures: int = 0


@contextlib.asynccontextmanager
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """Connections as many as it takes."""
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as client:
        yield client


async def send(
    client: aiohttp.ClientSession,
    sessions: Sequence[Sequence[Ask]],
    pick: Pick,
    load: Load,
    lot: Random,
    router: str | None = None,
    fields: Mapping[str, str] = EMULATED,
) -> Waited:
    """All sessions, to their ends. `router`: it is told which session a turn belongs to, and when one has ended.

    `fields`: what every request says besides.
    """
    waited = Waited()
    begin_s = time.monotonic()
    left = iter(enumerate(sessions))

    async def lane(start_s: float) -> None:
        await asyncio.sleep(start_s)
        for number, asks in left:
            await _session(client, number, asks, pick, router, fields, waited)

    lanes = min(len(sessions), load.concurrency or len(sessions))
    await asyncio.gather(*(lane(lot.uniform(0.0, load.spread_s)) for _ in range(lanes)))
    waited.makespan_s = time.monotonic() - begin_s
    return waited


async def _session(
    client: aiohttp.ClientSession,
    number: int,
    asks: Sequence[Ask],
    pick: Pick,
    router: str | None,
    fields: Mapping[str, str],
    waited: Waited,
) -> None:
    headers = {"X-Session-ID": f"session-{number}"} if router is not None else {}
    stall_s = 0.0
    for ask in asks:
        await asyncio.sleep(ask.gap_s)
        body = {**fields, "messages": ask.messages, "max_tokens": ask.num_output, "stream": True}
        start_s = time.monotonic()
        try:
            async with client.post(pick(number) + "/v1/chat/completions", json=body, headers=headers) as response:
                text = await response.text()
            # vLLM ends a stream that failed like any other.
            is_whole = text.endswith("data: [DONE]\n\n") and 'data: {"error"' not in text
        except (aiohttp.ClientError, TimeoutError):
            is_whole = False
        stall_s += time.monotonic() - start_s
        waited.num_failures += not is_whole
    waited.stalls_s.append(stall_s)
    if router is not None:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with client.post(f"{router}/finish_session", params={"session_id": f"session-{number}"}):
                pass


def in_turn(urls: Sequence[str]) -> Pick:
    """Whoever asks, one after the other."""
    turn = count()
    return lambda _: urls[next(turn) % len(urls)]


def by_session(urls: Sequence[str]) -> Pick:
    """A session's turns go to the same."""
    return lambda number: urls[number % len(urls)]

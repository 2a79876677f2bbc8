"""What the router adds to a stream: the time to its first byte, and to each byte after it, at many streams at once.

    python -m benchmarks.fleet.overhead --streams 200 --repetitions 5 --record
    python -m benchmarks.fleet.overhead --streams 200 --starts-per-s 10 --repetitions 5 --record
    python -m benchmarks.fleet.overhead --streams 2000 --chunks 5 --repetitions 1

Servers (a process each, real KV events), the router and the clients share this machine, so a figure holds the router's
queueing beside them and not the network's. Chunks carry the time at which they were written, by the one clock that
processes share. Arms are interleaved; each prompt is new. All streams begin within one interval between chunks, which
is a ramp of its own; with --starts-per-s streams begin as others end, and what is measured is that many at once.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import math
import os
import resource
import socket
import statistics
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from aiohttp import web

from benchmarks import record
from benchmarks.fleet.emulated import EmulatedServer
from impala_vllm.fleet.hashing import Prompt, Tokenizer
from impala_vllm.replay import tiny_model
from impala_vllm.replay.measures import quantile
from impala_vllm.sim.timing import DEFAULT, load

ARMS = ("direct", "router")
ROUTER = "from impala_vllm.cli.main import main; main()"
START_S = 300.0


class Metronome(EmulatedServer):
    """Begins to answer at once and writes a chunk, with the time, every `every_s`."""

    def __init__(self, tokenizer: Tokenizer, every_s: float) -> None:
        super().__init__(tokenizer, load(DEFAULT))
        self._every_s = every_s

    async def _compute(self, prompt: Prompt, tokens: Sequence[int]) -> int:
        return 0

    async def _answer(self, request: web.Request, body: Any, prompt: Prompt, cached: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number in range(body["max_tokens"]):
            if number:
                await asyncio.sleep(self._every_s)
            await response.write(f"data: {time.monotonic()}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


class Heard(NamedTuple):
    """One arm, once."""

    first_s: list[float]
    """From asking to the first byte."""
    later_s: list[float]
    """From a chunk's writing to its coming."""
    failures: int


def main() -> None:
    """Print one JSON line an arm and repetition, then what the router adds in the median."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet.overhead", description=main.__doc__)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--chunks", type=int, default=10)
    parser.add_argument("--every-s", type=float, default=1.0, help="between two chunks of a stream")
    parser.add_argument(
        "--starts-per-s", type=float, help="streams begin at this rate and last for as long as keeps --streams running"
    )
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--serve", metavar="TOKENIZER", help=argparse.SUPPRESS)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    if args.serve:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_serve(Path(args.serve), args.every_s))
        return
    logging.disable(logging.WARNING)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    found = asyncio.run(_measure(args))
    added = {name: [a[name] - b[name] for a, b in zip(found["router"], found["direct"], strict=True)]
             for name in ("first_p50_s", "later_p50_s")}  # fmt: skip
    medians = {f"added_{name}": statistics.median(values) for name, values in added.items()}
    print(json.dumps({**medians, "failures": sum(one["failures"] for one in found["router"])}), file=sys.stderr)
    if args.record:
        print(record.append(_records(found, added, args, record.origin())))


async def _measure(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    numbers = count()
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        tiny_model._tokenizer().save_pretrained(folder)  # pyright: ignore[reportPrivateUsage]
        server = ("-m", "benchmarks.fleet.overhead", "--serve", folder, "--every-s", str(args.every_s))
        urls: list[str] = []
        for _ in range(args.servers):
            process = await stack.enter_async_context(_running(*server))
            assert process.stdout is not None
            urls.append((await asyncio.wait_for(process.stdout.readline(), START_S)).decode().strip())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        workers = [word for url in urls for word in ("--worker", url)]
        router = ("-c", ROUTER, "router", *workers, "--tokenizer", folder, "--port", str(port))
        await stack.enter_async_context(_running(*router))
        client = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        at = {"direct": urls, "router": [f"http://127.0.0.1:{port}"]}
        await asyncio.wait_for(_ready(client, at["router"][0]), START_S)
        for repetition in range(args.repetitions):
            for arm in ARMS:
                heard = await _ask_all(client, at[arm], args, numbers)
                one = {
                    "first_p50_s": statistics.median(heard.first_s),
                    "first_p99_s": quantile(heard.first_s, 0.99),
                    "later_p50_s": statistics.median(heard.later_s),
                    "later_p99_s": quantile(heard.later_s, 0.99),
                    "failures": heard.failures,
                }
                found[arm].append(one)
                print(json.dumps({"arm": arm, "repetition": repetition, **one}), flush=True)
    return found


async def _ask_all(client: aiohttp.ClientSession, urls: Sequence[str], args: argparse.Namespace, numbers: Any) -> Heard:
    """All streams, begun evenly: within one interval, or for twice as long as one lasts, of which the end counts."""
    rate = args.starts_per_s or args.streams / args.every_s
    num_chunks, number, counts_s = args.chunks, args.streams, 0.0
    if args.starts_per_s:
        counts_s = args.streams / rate
        num_chunks, number = round(counts_s / args.every_s) + 1, 2 * args.streams
    heard = Heard([], [], 0)
    from_s = time.monotonic() + counts_s
    until_s = from_s + (counts_s or math.inf)
    streams = [
        _ask(client, urls[i % len(urls)], next(numbers), num_chunks, i / rate, (from_s, until_s), heard)
        for i in range(number)
    ]
    return heard._replace(failures=(await asyncio.gather(*streams)).count(False))


async def _ask(
    client: aiohttp.ClientSession,
    url: str,
    number: int,
    num_chunks: int,
    begins_s: float,
    counts_s: tuple[float, float],
    heard: Heard,
) -> bool:
    await asyncio.sleep(begins_s)
    messages = [{"role": "user", "content": f"stream {number} " * 20}]
    body = {"model": "emulated", "messages": messages, "max_tokens": num_chunks, "stream": True}
    start_s, last = time.monotonic(), b""
    try:
        async with client.post(url + "/v1/chat/completions", json=body) as response:
            is_first = True
            async for line in response.content:
                now_s = time.monotonic()
                if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                    if not counts_s[0] <= now_s < counts_s[1]:
                        pass
                    elif is_first:
                        heard.first_s.append(now_s - start_s)
                    else:
                        heard.later_s.append(now_s - float(line.removeprefix(b"data: ")))
                    is_first = False
                last = line.strip() or last
    except (aiohttp.ClientError, ValueError):
        return False
    return last == b"data: [DONE]"


async def _ready(client: aiohttp.ClientSession, url: str) -> None:
    """Until the router hashes what it is asked: from then on it does all its work."""
    body = {"model": "emulated", "messages": [{"role": "user", "content": "hello"}]}
    while True:
        with contextlib.suppress(aiohttp.ClientError):
            async with client.post(url + "/v1/impala/route", json=body) as response:
                if (await response.json()).get("is_hashed"):
                    return
        await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def _running(*arguments: str) -> AsyncIterator[Process]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(part or os.getcwd() for part in sys.path)}
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=PIPE, env=env)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _serve(folder: Path, every_s: float) -> None:
    async with Metronome(Tokenizer(str(folder)), every_s) as server:
        print(server.url, flush=True)
        await asyncio.Event().wait()


def _records(
    found: dict[str, list[dict[str, float]]],
    added: dict[str, list[float]],
    args: argparse.Namespace,
    origin: record.Origin,
) -> list[record.Record]:
    params = {name: getattr(args, name) for name in ("streams", "chunks", "every_s", "servers")}
    if args.starts_per_s:
        params["starts_per_s"] = args.starts_per_s
    rows = [(arm, name, [one[name] for one in ones]) for arm, ones in found.items() for name in ones[0]]
    rows += [("router", f"added_{name}", values) for name, values in added.items()]
    return [
        record.Record(
            question="serving/router-overhead",
            variant=arm,
            params=params,
            metric=name,
            unit="requests" if name == "failures" else "s",
            better="lower",
            n=len(values),
            p20=quantile(values, 0.2),
            p50=quantile(values, 0.5),
            p80=quantile(values, 0.8),
            source="measured",
            seed=None,
            **asdict(origin),
        )
        for arm, name, values in rows
    ]


if __name__ == "__main__":
    main()

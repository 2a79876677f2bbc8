"""Fleets of emulated servers under several routers: tasks an hour, stall, hit ratio, spread of load.

Sessions are synthetic agents: a shared system prompt, turns that each extend the last, tool gaps. No ids are sent. Arms
are interleaved within each repetition; all run in this process, so figures compare arms and say nothing absolute.

    python -m benchmarks.fleet --servers 4 --sessions 16 --turns 6 --repetitions 3 \
        --rival "vllm-router=vllm-router --port {port} --policy cache_aware --worker-urls {urls}"
"""

import argparse
import asyncio
import json
import logging
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import aiohttp

from benchmarks import record
from benchmarks.fleet.emulated import EmulatedServer
from benchmarks.fleet.serving import serving
from impala_vllm.fleet.fleet import parse_address
from impala_vllm.fleet.hashing import Tokenizer
from impala_vllm.fleet.proxy import RouterOptions
from impala_vllm.replay import tiny_model
from impala_vllm.replay.measures import quantile
from impala_vllm.replay.server import Server
from impala_vllm.sim.timing import DEFAULT, load

SETTLES_S = 10.0
"""Other routers answer before they have found all their servers; they are given so long."""
Pick = Callable[[list[str], int], str]
"""Of addresses and the session's number."""


class Outcome(NamedTuple):
    """One arm, once."""

    stall_mean_s: float
    tasks_per_hour: float
    hit_ratio: float
    spread: float
    """Prompt tokens of the server with most over the mean."""
    failures: int


def main() -> None:
    """Run the arms and print one JSON line each, then medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=main.__doc__)
    parser.add_argument("--servers", type=int, default=4)
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--hbm-tokens", type=int, default=40_000)
    parser.add_argument(
        "--speed", type=float, default=0.1, help="of the timing: below 1, prefill outweighs this machine"
    )
    parser.add_argument(
        "--rival",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="another router, with {port} and {urls} in its command",
    )
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    args.rivals = dict(rival.split("=", 1) for rival in args.rival)
    logging.disable(logging.WARNING)
    found: dict[str, list[Outcome]] = {arm: [] for arm in ("round_robin", "sticky", *args.rivals, "impala")}
    with tempfile.TemporaryDirectory() as folder:
        tiny_model._tokenizer().save_pretrained(folder)  # pyright: ignore[reportPrivateUsage]
        tokenizer = Tokenizer(folder)
        for repetition in range(args.repetitions):
            for arm, outcomes in found.items():
                outcomes.append(asyncio.run(_run(arm, args, tokenizer, Path(folder), repetition)))
                print(json.dumps({"arm": arm, "repetition": repetition, **outcomes[-1]._asdict()}), flush=True)
    for arm, outcomes in found.items():
        medians = {name: statistics.median(getattr(o, name) for o in outcomes) for name in Outcome._fields}
        print(json.dumps({"arm": arm, "medians_of": len(outcomes), **medians}), file=sys.stderr)
    if args.record:
        print(record.append(_records(found, args, record.origin())))


async def _run(arm: str, args: argparse.Namespace, tokenizer: Tokenizer, folder: Path, seed: int) -> Outcome:
    timing = load(DEFAULT)
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(
                EmulatedServer(tokenizer, timing, speed=args.speed, hbm_tokens=args.hbm_tokens)
            )
            for _ in range(args.servers)
        ]
        urls = [server.url for server in servers]
        pick = _picks(arm)
        if arm == "impala":
            options = RouterOptions(tuple(parse_address(url) for url in urls), tokenizer=str(folder))
            urls = [await stack.enter_async_context(serving(options))]
        elif arm in args.rivals:
            parts = [urls if part == "{urls}" else [part] for part in shlex.split(args.rivals[arm])]
            rival = Server(arm, [word for part in parts for word in part], folder / f"{arm}.log")
            stack.callback(rival.stop)
            rival.start()
            await asyncio.to_thread(rival.wait_ready, 120.0)
            await asyncio.sleep(SETTLES_S)
            urls = [rival.url]
        client = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        start_s = time.monotonic()
        stalls = await asyncio.gather(
            *(_session(number, seed, args.turns, client, urls, pick) for number in range(args.sessions))
        )
        makespan_s = time.monotonic() - start_s
        served = [server.served for server in servers]
    prompt = [s.prompt_tokens for s in served]
    return Outcome(
        statistics.mean(stall for stall, _ in stalls),
        3600 * args.sessions / makespan_s,
        sum(s.cached_tokens for s in served) / sum(prompt),
        max(prompt) / statistics.mean(prompt),
        sum(failures for _, failures in stalls),
    )


async def _session(
    number: int, seed: int, num_turns: int, client: aiohttp.ClientSession, urls: list[str], pick: Pick
) -> tuple[float, int]:
    """Stall and failures of one agent."""
    lot = Random(f"{seed}/{number}")
    words = ["open", "the", "file", "then", "def", "run", "test_case", "return", "value", "=", "12", "(x, y):"]
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You are an agent. Tools follow. " * 150}]
    stall_s, failures = 0.0, 0
    await asyncio.sleep(lot.uniform(0.0, 3.0))
    for _ in range(num_turns):
        messages.append({"role": "user", "content": " ".join(lot.choices(words, k=lot.randrange(100, 900)))})
        body = {"model": "emulated", "messages": messages, "max_tokens": 8, "stream": True}
        start_s = time.monotonic()
        async with client.post(pick(urls, number) + "/v1/chat/completions", json=body) as response:
            text = await response.text()
        stall_s += time.monotonic() - start_s
        failures += not text.endswith("data: [DONE]\n\n")
        messages.append({"role": "assistant", "content": "word " * 8})
        await asyncio.sleep(lot.expovariate(1.0))
    return stall_s, failures


def _picks(arm: str) -> Pick:
    """`sticky` is told each session's number, which the router is not."""
    if arm == "sticky":
        return lambda urls, session: urls[session % len(urls)]
    turn = count()
    return lambda urls, _: urls[next(turn) % len(urls)]


def _records(found: dict[str, list[Outcome]], args: argparse.Namespace, origin: record.Origin) -> list[record.Record]:
    kinds = {"stall_mean_s": ("s", "lower"), "tasks_per_hour": ("tasks/h", "higher"), "hit_ratio": ("share", "higher"),
             "spread": ("ratio", "lower"), "failures": ("requests", "lower")}  # fmt: skip
    params = {name: getattr(args, name) for name in ("servers", "sessions", "turns", "hbm_tokens", "speed")}
    records: list[record.Record] = []
    for arm, outcomes in found.items():
        for metric, (unit, better) in kinds.items():
            values = [float(getattr(o, metric)) for o in outcomes]
            records.append(
                record.Record(
                    question="serving/fleet-emulated",
                    variant=arm,
                    params=params,
                    metric=metric,
                    unit=unit,
                    better=better,
                    n=len(values),
                    p20=quantile(values, 0.2),
                    p50=quantile(values, 0.5),
                    p80=quantile(values, 0.8),
                    source="measured",
                    seed=None,
                    **asdict(origin),
                )
            )
    return records


if __name__ == "__main__":
    main()

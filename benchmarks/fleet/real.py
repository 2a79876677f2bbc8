"""Recorded sessions without ids through `impala router` before two real engines: failures, and hits to the bound.

    python -m benchmarks.fleet.real --traces LOG --record

The bound is one cache that never forgets: every block of a prompt but its first time. Each engine has HBM for --room of
all distinct blocks, so that neither could serve alone. Prompts are the recording's at a --scale-th, as those of
`benchmarks.fleet`, on a tiny model; gaps are shorter by --speed. round_robin, beside it, sends turns to the engines one
after the other, under another cache salt. About five minutes on two cores.
"""

import argparse
import asyncio
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import aiohttp

from benchmarks import record
from benchmarks.fleet import chats, clients, routers, sessions
from impala_vllm.fleet.hashing import Prompts, Scheme, Tokenizer
from impala_vllm.fleet.hashing.scheme import function
from impala_vllm.fleet.places import BlockKey
from impala_vllm.replay import arms, counters, tiny_model
from impala_vllm.replay.arms import Machine
from impala_vllm.replay.server import Server, ServerError
from impala_vllm.workload import WorkloadError

LOGS = Path(__file__).parents[2] / "out" / "fleet"
QUESTION = "serving/fleet-engines"
ENGINES = 2
BLOCK_TOKENS = 32
READY_S = 600.0
MODEL = "tiny"
EVENTS = '{"enable_kv_cache_events": true, "endpoint": "tcp://*:0", "replay_endpoint": "tcp://*:0"}'
ARMS = ("impala", "round_robin")
KINDS = {
    "failures": ("requests", "lower"),
    "hit_ratio": ("share", "higher"),
    "hits / bound": ("share", "higher"),
    "spread": ("ratio", "lower"),
    "stall_mean_s": ("s", "lower"),
}


class Bound(NamedTuple):
    """What one cache that never forgets comes to, whatever the order: prefixes are there as soon as they were asked."""

    prompt_tokens: int
    hit_tokens: int
    distinct_blocks: int
    longest_tokens: int
    """Prompt and answer."""


def bound(asked: Sequence[Sequence[chats.Ask]], tokenizer: Tokenizer, block_tokens: int) -> Bound:
    """Of these sessions. Blocks are equal under one hash scheme where they are under another."""
    prompts = Prompts(Scheme("sha256", function("sha256")("bound"), block_tokens), tokenizer)
    seen: set[BlockKey] = set()
    num_tokens = num_blocks = longest = 0
    for asks in asked:
        for ask in asks:
            prompt = prompts.of_chat({"messages": ask.messages})
            assert prompt is not None, "these are plain chats"
            seen.update(prompt.keys)
            num_tokens, num_blocks = num_tokens + prompt.num_tokens, num_blocks + len(prompt.keys)
            longest = max(longest, prompt.num_tokens + ask.num_output)
    return Bound(num_tokens, (num_blocks - len(seen)) * block_tokens, len(seen), longest)


def main() -> None:
    """Replay the arms, print one JSON line each, and record."""
    args = _arguments()
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it: its servers end with it
    origin, found = record.origin(), dict[str, list[dict[str, float]]]()
    logs = LOGS / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-engines"
    try:
        model = tiny_model.build(args.model)
        tokenizer = Tokenizer(str(model))
        pool = sessions.scaled(args.traces, args.turns, args.scale, args.max_gap_s)
        chosen, words = sessions.chosen(pool, args.sessions, Random(args.seed)), chats.Words(tokenizer)
        asked = [chats.recorded(steps, words, args.scale, args.speed) for steps in chosen]
        limit = bound(asked, tokenizer, BLOCK_TOKENS)
        num_blocks = limit.distinct_blocks + 2 * sum(map(len, asked))  # those of answers lie there too
        machine = Machine(
            model,
            hbm_blocks=math.ceil(args.room * num_blocks),
            block_size=BLOCK_TOKENS,
            max_model_len=limit.longest_tokens + BLOCK_TOKENS,
        )
        with ExitStack() as stack:
            engines = [stack.enter_context(engine) for engine in _engines(machine, logs)]
            _replay(args, asked, limit, engines, stack, logs, found)
    except (WorkloadError, ServerError, tiny_model.TinyModelError, OSError, aiohttp.ClientError) as e:
        sys.exit(f"{type(e).__name__}: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    else:
        if not any(one["failures"] for ones in found.values() for one in ones):
            shutil.rmtree(logs)
    finally:
        params = {"traces": args.traces.name, "model": args.model, "engines": ENGINES}
        names = ("sessions", "turns", "scale", "speed", "room", "spread_s", "max_gap_s")
        params |= {name: getattr(args, name) for name in names}
        if args.record and found:
            print(record.append(records(found, params, args.seed, origin)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet.real", description=main.__doc__)
    parser.add_argument("--traces", type=Path, required=True, help="recorded sessions")
    parser.add_argument("--sessions", type=int, default=24)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--scale", type=int, default=32, help="recorded tokens to a token that is sent")
    parser.add_argument("--speed", type=float, default=8.0, help="how much shorter gaps are")
    parser.add_argument("--spread-s", type=float, default=15.0, help="sessions start within so many seconds")
    parser.add_argument("--max-gap-s", type=float, default=30.0, help="longer recorded gaps are cut")
    parser.add_argument("--room", type=float, default=0.75, help="HBM of each engine, to all distinct blocks")
    parser.add_argument("--model", choices=sorted(tiny_model.SIZES), default="1m")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated")
    parser.add_argument("--seed", type=int, default=0, help="which sessions, and when they start")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    if unknown := sorted({*args.arms.split(",")} - {*ARMS}):
        parser.error(f"--arms: unknown {', '.join(unknown)}; there are {', '.join(ARMS)}")
    if args.scale <= 0 or args.scale * sessions.BLOCK_TOKENS % sessions.RECORDED_BLOCK_TOKENS:
        parser.error("--scale: a multiple of 4, so that blocks stay whole")
    if args.turns < sessions.MIN_TURNS:
        parser.error(f"--turns: {sessions.MIN_TURNS} at least, as recorded sessions have")
    return args


def _engines(machine: Machine, logs: Path) -> list[Server]:
    """Not started yet. Each has a core of its own, or both would be given the same one."""
    cores = sorted(os.sched_getaffinity(0))
    ours = arms.ARMS["impala-enforce"]
    made: list[Server] = []
    for number in range(ENGINES):
        env = {"VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_OMP_THREADS_BIND": str(cores[number % len(cores)])}
        arm = replace(ours, name=f"engine-{number}", args=(*ours.args, "--kv-events-config", EVENTS), env=env)
        made.append(arms.server(arm, machine, logs))
    return made


def _replay(
    args: argparse.Namespace,
    asked: Sequence[Sequence[chats.Ask]],
    limit: Bound,
    engines: Sequence[Server],
    stack: ExitStack,
    logs: Path,
    found: dict[str, list[dict[str, float]]],
) -> None:
    """Fills `found` as arms come to their ends. Raises ServerError."""
    for engine in engines:
        engine.wait_ready(READY_S)
    workers = [word for engine in engines for word in ("--worker", engine.url)]
    command = [sys.executable, "-m", "impala_vllm.cli.main", "router", "--port", "{port}", *workers]
    router = stack.enter_context(Server("router", command, logs / "router.log"))
    router.wait_ready(READY_S)
    asyncio.run(_settled(router))
    for repetition in range(args.repetitions):
        for name in args.arms.split(","):
            before = [counters.scrape(engine.url) for engine in engines]
            urls = [router.url] if name == "impala" else [engine.url for engine in engines]
            fields = {"model": MODEL, "cache_salt": f"{name} {repetition}"}
            waited = asyncio.run(_sent(asked, urls, args.spread_s, args.seed, fields))
            for process in (router, *engines):
                process.check_alive()
            after = [counters.scrape(engine.url) for engine in engines]
            figures = _figures(before, after, waited, limit)
            found.setdefault(name, []).append(figures)
            print(json.dumps({"arm": name, "repetition": repetition, **figures}), flush=True)


async def _settled(router: Server) -> None:
    """Until it believes the hashes of all engines and follows their events. Raises ServerError."""
    await routers.until_hashing(router, MODEL)
    said: list[tuple[str, str]] = []
    until_s = time.monotonic() + READY_S
    async with aiohttp.ClientSession() as client:
        while time.monotonic() < until_s:
            async with client.get(router.url + "/v1/impala/servers") as response:
                said = [(server["hashes"], server["events"]) for server in (await response.json())["servers"]]
            if said == [("ok", "ok")] * ENGINES:
                return
            await asyncio.sleep(0.5)
    raise ServerError(f"{router.name}: hashes and events are {said}; see {router.log}")


async def _sent(
    asked: Sequence[Sequence[chats.Ask]], urls: Sequence[str], spread_s: float, seed: int, fields: dict[str, str]
) -> clients.Waited:
    async with clients.http() as client:
        lot, load = Random(seed), clients.Load(spread_s)
        return await clients.send(client, asked, clients.in_turn(urls), load, lot, fields=fields)


def _figures(
    before: Sequence[dict[str, float]], after: Sequence[dict[str, float]], waited: clients.Waited, limit: Bound
) -> dict[str, float]:
    def grown(name: str) -> list[float]:
        return [late[name] - early.get(name, 0.0) for early, late in zip(before, after, strict=True)]

    asked, hits = grown("vllm:prefix_cache_queries_total"), grown("vllm:prefix_cache_hits_total")
    if not sum(asked):
        raise ServerError("no engine was asked anything")
    computed = [queries - found for queries, found in zip(asked, hits, strict=True)]
    if sum(asked) != limit.prompt_tokens:
        print(f"engines count {sum(asked):.0f} prompt tokens, {limit.prompt_tokens} were sent", file=sys.stderr)
    return {
        "failures": waited.num_failures,
        "hit_ratio": sum(hits) / sum(asked),
        "hits / bound": sum(hits) / limit.hit_tokens,
        "spread": max(computed) * len(computed) / sum(computed),
        "stall_mean_s": sum(waited.stalls_s) / len(waited.stalls_s),
    }


def records(
    found: Mapping[str, Sequence[Mapping[str, float]]], params: dict[str, Any], seed: int, origin: record.Origin
) -> list[record.Record]:
    """Where turns failed, only how many: what failed was not computed, so hits say nothing."""
    return [
        origin.record(QUESTION, arm, params, metric, unit, better, [one[metric] for one in ones], seed=seed)
        for arm, ones in found.items()
        for metric, (unit, better) in KINDS.items()
        if metric == "failures" or not any(one["failures"] for one in ones)
    ]


if __name__ == "__main__":
    main()

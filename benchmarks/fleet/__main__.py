"""Fleets of emulated servers under several routers: tasks an hour, stall, hit ratio, spread of load.

    PATH=ROUTERS/bin:$PATH python -m benchmarks.fleet --traces LOG --record

Recorded coding sessions, or without --traces synthetic agents: chats, sent without ids but to routers that cannot do
without. Routers are processes, servers and clients are this one; figures compare arms and say nothing absolute. A token
of a server stands for --scale of the recording's, in its timing too, and all times are shorter by --speed. Arms are
interleaved, every second repetition backwards; routers that are not installed are left out, with a line that says so.
All defaults, nine arms and five repetitions take about an hour on two cores that do nothing else.
"""

import argparse
import asyncio
import json
import logging
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any

from benchmarks import record
from benchmarks.fleet import chats, clients, routers, sessions
from benchmarks.fleet.emulated import EmulatedServer
from benchmarks.fleet.outcome import Outcome, records, summary
from impala_vllm.fleet.hashing import Tokenizer
from impala_vllm.replay import tiny_model
from impala_vllm.replay.server import ServerError
from impala_vllm.sim.timing import DEFAULT, load

BLOCK_TOKENS = 16
RECORDED_BLOCK_TOKENS = 64
DIRECT = ("round_robin", "sticky")
"""Clients that choose themselves; the second is told each session's number, which routers are not."""


def main() -> None:
    """Run the arms and print one JSON line each, then medians."""
    args = _arguments()
    logging.disable(logging.WARNING)
    names = [*DIRECT, *routers.ARMS] if args.arms is None else args.arms.split(",")
    if unknown := sorted({*names} - {*DIRECT, *routers.ARMS}):
        sys.exit(f"--arms: unknown {', '.join(unknown)}; there are {', '.join((*DIRECT, *routers.ARMS))}")
    left_out = {name: reason for name in names if (reason := routers.missing(name)) is not None}
    for name, reason in left_out.items():
        print(f"{name}: left out: {reason}", file=sys.stderr)
    found: dict[str, list[Outcome]] = {name: [] for name in names if name not in left_out}
    if not found:
        sys.exit("no arm is left")
    with tempfile.TemporaryDirectory() as folder:
        tiny_model._tokenizer().save_pretrained(folder)  # pyright: ignore[reportPrivateUsage]
        run = _Runs(args, Path(folder))
        for repetition in range(args.repetitions):
            for name in [*found] if repetition % 2 == 0 else [*reversed(found)]:
                try:
                    outcome = asyncio.run(run.one(name, repetition))
                except ServerError as e:
                    print(f"{name}: dropped: {e}", file=sys.stderr)
                    del found[name]
                    continue
                found[name].append(outcome)
                print(json.dumps({"arm": name, "repetition": repetition, **outcome._asdict()}), flush=True)
    for line in summary(found):
        print(line, file=sys.stderr)
    if args.record and any(found.values()):
        print(record.append(records(found, _params(args), record.origin())))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=main.__doc__)
    parser.add_argument("--traces", type=Path, help="recorded sessions; synthetic agents otherwise")
    parser.add_argument("--servers", type=int, default=16)
    parser.add_argument("--sessions", type=int, default=160)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--concurrency", type=int, help="closed loop: so many live at a time; all, otherwise")
    parser.add_argument("--spread-s", type=float, default=60.0, help="sessions start within so many seconds")
    parser.add_argument("--max-gap-s", type=float, default=30.0, help="longer recorded gaps are cut")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--arms", help=f"comma-separated; {', '.join((*DIRECT, *routers.ARMS))} otherwise")
    parser.add_argument("--scale", type=int, default=32, help="recorded tokens to a token that is sent")
    parser.add_argument("--hbm-tokens", type=int, help="of the tokens that are sent; the timing's otherwise")
    parser.add_argument("--speed", type=float, default=4.0, help="how much faster than life")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    if args.traces is None:
        args.scale = 1
    elif args.scale * BLOCK_TOKENS % RECORDED_BLOCK_TOKENS:
        parser.error(f"--scale: a multiple of {RECORDED_BLOCK_TOKENS // BLOCK_TOKENS}, so that blocks stay whole")
    elif args.turns < sessions.MIN_TURNS:
        parser.error(f"--turns: {sessions.MIN_TURNS} at least, as recorded sessions have")
    return args


class _Runs:
    """What all arms and repetitions share."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args = args
        self._folder = folder
        self._tokenizer = Tokenizer(str(folder))
        self._timing = load(DEFAULT)
        self._hbm_tokens: int = args.hbm_tokens or self._timing.hbm_tokens // args.scale
        self._words = chats.Words(self._tokenizer)
        coarser = args.scale * BLOCK_TOKENS // RECORDED_BLOCK_TOKENS
        self._pool = sessions.recorded(args.traces, args.turns, coarser, args.max_gap_s) if args.traces else None

    async def one(self, name: str, seed: int) -> Outcome:
        """One arm, once. Raises ServerError where its router does not come up, or does not last."""
        args, lot = self._args, Random(seed)
        asked = self._sessions(lot)
        async with AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(self._server()) for _ in range(args.servers)]
            urls, told = [server.url for server in servers], None
            if name in routers.ARMS:
                site = routers.Site(servers, self._folder, self._timing, args.scale, args.speed, self._hbm_tokens)
                arm = routers.ARMS[name]
                urls = [await stack.enter_async_context(routers.running(name, arm, site, self._folder))]
                told = urls[0] if arm.is_told else None
            pick = clients.in_turn(urls) if name != "sticky" else clients.by_session(urls)
            client = await stack.enter_async_context(clients.http())
            waited = await clients.send(
                client, asked, pick, clients.Load(args.spread_s / args.speed, args.concurrency), lot, told
            )
            return Outcome.of(waited, [server.served for server in servers])

    def _sessions(self, lot: Random) -> list[list[chats.Ask]]:
        args = self._args
        if self._pool is None:
            return [chats.agent(args.turns, lot) for _ in range(args.sessions)]
        chosen = sessions.chosen(self._pool, args.sessions, lot)
        return [chats.recorded(steps, self._words, args.scale, args.speed) for steps in chosen]

    def _server(self) -> EmulatedServer:
        return EmulatedServer(
            self._tokenizer,
            self._timing,
            speed=self._args.speed,
            hbm_tokens=self._hbm_tokens,
            tokens_each=self._args.scale,
            tells_tokens=True,
        )


def _params(args: argparse.Namespace) -> dict[str, Any]:
    names = ("servers", "sessions", "turns", "concurrency", "spread_s", "max_gap_s", "scale", "hbm_tokens", "speed")
    traces = args.traces.name if args.traces else "agents"
    return {"traces": traces, **{name: getattr(args, name) for name in names if getattr(args, name) is not None}}


if __name__ == "__main__":
    main()

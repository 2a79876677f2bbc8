"""Fleets of emulated servers under several routers: tasks an hour, stall, hit ratio, spread of load.

    PATH=$PATH:ROUTERS/bin python -m benchmarks.fleet --traces LOG --record

Recorded coding sessions, or without --traces synthetic agents: chats, sent without ids but to routers that cannot do
without. Routers are processes, servers and clients are this one; figures compare arms and say nothing absolute. A token
of a server stands for --scale of the recording's, in its timing and in our router's prices too, and all times are
shorter by --speed. Arms are interleaved, every second repetition backwards. What fails is done once more; routers that
are not installed, or fail twice, are left out, and figures say so. Logs of what failed stay in out/fleet, and Ctrl-C
keeps the repetitions that are whole. All defaults, nine arms and five repetitions take about an hour on two cores that
do nothing else.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import sys
import tempfile
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from benchmarks import record
from benchmarks.fleet import chats, clients, routers, sessions
from benchmarks.fleet.attempts import Attempts
from benchmarks.fleet.emulated import EmulatedServer
from benchmarks.fleet.outcome import Outcome, records, summary
from impala_vllm.fleet.hashing import Tokenizer
from impala_vllm.replay import tiny_model
from impala_vllm.sim import timing
from impala_vllm.workload import WorkloadError

LONGEST_S = 1200.0
"""For one arm, once: with a router that hangs, each turn of each session would wait for its own end."""
LOGS = Path(__file__).parents[2] / "out" / "fleet"
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
    attempts = Attempts([name for name in names if name not in left_out], left_out)
    if not attempts.found:
        sys.exit("no arm is left")
    origin = record.origin()  # an hour from now the tree may be another one
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it, what is whole is kept
    with tempfile.TemporaryDirectory() as folder:
        tiny_model._tokenizer().save_pretrained(folder)  # pyright: ignore[reportPrivateUsage]
        try:
            run = _Runs(args, Path(folder))
        except (WorkloadError, OSError) as e:
            sys.exit(f"--traces {e}")
        try:
            attempts.run(run.one, args.repetitions)
        except KeyboardInterrupt:
            print("interrupted; of what is whole:", file=sys.stderr)
            sys.exit(130)
        finally:
            _tell(attempts, args, origin)


def _tell(attempts: Attempts, args: argparse.Namespace, origin: record.Origin) -> None:
    """Whatever has come to its end so far."""
    found, faults = attempts.found, attempts.faults
    for line in summary(found, faults):
        print(line, file=sys.stderr)
    params = _params(args) | ({"tried again": "; ".join(attempts.again)} if attempts.again else {})
    if args.record and (made := records(found, faults, params, origin)):
        print(record.append(made))


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
    elif args.scale <= 0 or args.scale * sessions.BLOCK_TOKENS % sessions.RECORDED_BLOCK_TOKENS:
        least = sessions.RECORDED_BLOCK_TOKENS // sessions.BLOCK_TOKENS
        parser.error(f"--scale: a multiple of {least}, so that blocks stay whole")
    elif args.turns < sessions.MIN_TURNS:
        parser.error(f"--turns: {sessions.MIN_TURNS} at least, as recorded sessions have")
    return args


class _Runs:
    """What all arms and repetitions share."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args = args
        self._folder = folder
        self._tokenizer = Tokenizer(str(folder))
        self._timing = timing.load(timing.DEFAULT)
        self._hbm_tokens: int = args.hbm_tokens or self._timing.hbm_tokens // args.scale
        self._words = chats.Words(self._tokenizer)
        self._pool = sessions.scaled(args.traces, args.turns, args.scale, args.max_gap_s) if args.traces else None
        self._logs = LOGS / f"{datetime.now(UTC):%Y%m%dT%H%M%S}"
        """Of routers that failed."""

    def one(self, name: str, seed: int) -> Outcome:
        """One arm, once, everything anew. Raises ServerError where its router does not come up, or does not last."""
        places = (self._logs / f"{name}-{seed}-{attempt}.log".replace(" ", "-") for attempt in count(1))
        log = next(place for place in places if not place.exists())
        outcome = asyncio.run(self._one(name, seed, log))
        if outcome.is_whole():
            log.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # logs of failures are there, or none was written
                self._logs.rmdir()
        return outcome

    async def _one(self, name: str, seed: int, log: Path) -> Outcome:
        args, lot = self._args, Random(seed)
        asked = self._sessions(lot)
        async with AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(self._server()) for _ in range(args.servers)]
            urls, told = [server.url for server in servers], None
            if name in routers.ARMS:
                site = routers.Site(servers, self._folder, self._timing, args.scale, args.speed, self._hbm_tokens)
                arm = routers.ARMS[name]
                urls = [await stack.enter_async_context(routers.running(name, arm, site, log))]
                told = urls[0] if arm.is_told else None
            pick = clients.in_turn(urls) if name != "sticky" else clients.by_session(urls)
            client = await stack.enter_async_context(clients.http())
            load = clients.Load(args.spread_s / args.speed, args.concurrency)
            async with asyncio.timeout(LONGEST_S):
                waited = await clients.send(client, asked, pick, load, lot, told)
            outcome = Outcome.of(waited, [server.served for server in servers])
        print(json.dumps({"arm": name, "repetition": seed, **outcome._asdict()}), flush=True)
        return outcome

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

"""Fleets in virtual time: recorded sessions, emulated engines, the router's own decisions beside others'.

    python -m benchmarks.fleet.virtual --traces LOG --servers 16 --sessions-per-server 6 --seeds 0,1,2 [--record]

`impala` is `fleet.router.Router` as `impala router` runs it, told nothing but prompts; `consistent_hash` and `sticky`
are told which session a turn belongs to. Engines: prefill is one queue, decode steps run beside it, KV is vLLM's LRU.
Only the time of an engine is modelled. With --restarts that share of the servers loses all KV every minute.
"""

import argparse
import heapq
import json
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from benchmarks import record
from benchmarks.fleet import peers
from benchmarks.fleet.emulated import Pool
from impala_vllm.core.types import Namespace, Outcome
from impala_vllm.fleet.hashing import Prompt
from impala_vllm.fleet.index import IndexConfig, MaskIndex
from impala_vllm.fleet.places import BlockKey, Replica, ServerId, key_of
from impala_vllm.fleet.residency import Residency
from impala_vllm.fleet.router import Router, Ticket, Turn
from impala_vllm.fleet.scoring import Load, Policy
from impala_vllm.sim.timing import DEFAULT, Timing, load
from impala_vllm.workload import load as load_log

ARMS = ("round_robin", "least_loaded", "consistent_hash", "sticky", "cache_aware", "dynamo_cost", "impala")
MAX_GAP_S = 120.0
MAX_TOKENS = 131_072
"""A recording stops before the first prompt that is longer: the model of the timing takes no more."""


class Step(NamedTuple):
    """A turn of a session."""

    keys: list[BlockKey]
    num_tokens: int
    block_tokens: int
    num_output: int
    gap_s: float
    """After the turn before."""


class Result(NamedTuple):
    """One arm, once."""

    tasks_per_hour: float
    stall_mean_s: float
    stall_p95_s: float
    hit_ratio: float
    spread: float
    """Prefill seconds of the server with most over the mean."""


class Asked(NamedTuple):
    """A turn at a server."""

    session: int
    number: int
    server: int
    ticket: Ticket | None
    at_s: float


class Engine:
    """One server: a prefill queue, decodes, a pool."""

    def __init__(self, timing: Timing, block_tokens: int) -> None:
        self.timing = timing
        self.pool = Pool(timing.hbm_tokens // block_tokens)
        self.queue: deque[Asked] = deque()
        """The first of them is being computed."""
        self.num_decoding = 0
        self.busy_s = 0.0


class Fleet:
    """One run of one arm."""

    def __init__(
        self, arm: str, sessions: Sequence[Sequence[Step]], num_servers: int, timing: Timing, lot: Random
    ) -> None:
        block_tokens = sessions[0][0].block_tokens
        self.arm, self.sessions, self.timing, self.lot = arm, sessions, timing, lot
        self.replicas = [Replica(ServerId(f"http://s{i}")) for i in range(num_servers)]
        self.engines = [Engine(timing, block_tokens) for _ in self.replicas]
        self.running = [0] * num_servers
        self.index = MaskIndex(IndexConfig(ttl_s=1e9))
        self.loads = {replica: Load(timing.hbm_tokens) for replica in self.replicas}
        self.router = Router(self.loads, Residency(self.index, IndexConfig()), Policy(), lot)
        self.peer = self._peer(num_servers)
        self._queue: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = count()
        self.stalls = [0.0] * len(sessions)
        self.ended_s = 0.0
        self.prompt_tokens = self.cached_tokens = 0

    def run(self, starts_s: Sequence[float], restarts_a_minute: float) -> Result:
        """Until every session is over."""
        for number, start_s in enumerate(starts_s):
            self._at(start_s, lambda now, n=number: self._arrive(n, 0, now))
        self._num_left = len(self.sessions)
        self._at(1.0, self._tick)
        if restarts_a_minute:
            self._at(60.0, lambda now: self._restart(now, restarts_a_minute))
        while self._num_left:
            now, _, what = heapq.heappop(self._queue)
            what(now)
        busy = [engine.busy_s for engine in self.engines]
        return Result(
            3600 * len(self.sessions) / self.ended_s,
            statistics.mean(self.stalls),
            sorted(self.stalls)[int(0.95 * len(self.stalls))],
            self.cached_tokens / self.prompt_tokens,
            max(busy) / statistics.mean(busy),
        )

    def _at(self, time_s: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self._queue, (time_s, next(self._numbers), what))

    def _tick(self, now: float) -> None:
        if self.arm == "impala":
            self.router.tick(now)
        self._at(now + 1.0, self._tick)

    def _restart(self, now: float, share: float) -> None:
        for server in self.lot.sample(range(len(self.engines)), round(share * len(self.engines))):
            self.engines[server].pool = Pool(self.timing.hbm_tokens // self.sessions[0][0].block_tokens)
            self.index.clear(self.replicas[server])
            if self.arm == "impala":
                self.router.leave(self.replicas[server])
        self._at(now + 60.0, lambda later: self._restart(later, share))

    def _arrive(self, session: int, number: int, now: float) -> None:
        step = self.sessions[session][number]
        ticket: Ticket | None = None
        if self.peer is None:
            turn = Turn(Namespace(), Prompt(step.keys, step.num_tokens, 0), step.block_tokens, step.num_tokens)
            ticket = self.router.start(turn, self.loads, (), now)
            assert ticket is not None
            server = self.replicas.index(ticket.decision.replica)
        else:
            server = self.peer.pick(step.keys, session, self.running)
        self.running[server] += 1
        engine = self.engines[server]
        if isinstance(self.peer, peers.DynamoCost):
            self.peer.prefill_blocks[server] += len(step.keys)
            self.peer.active_blocks[server] += len(step.keys)
        engine.queue.append(Asked(session, number, server, ticket, now))
        if len(engine.queue) == 1:
            self._prefill(engine, now)

    def _prefill(self, engine: Engine, now: float) -> None:
        asked = engine.queue[0]
        step = self.sessions[asked.session][asked.number]
        cached = min(engine.pool.num_held(step.keys) * step.block_tokens, step.num_tokens - 1)
        seconds = self.timing.fixed_s + self.timing.prefill_s(step.num_tokens - cached, cached)
        seconds += engine.num_decoding * self.timing.decode_s_per_request
        engine.busy_s += seconds
        self.prompt_tokens += step.num_tokens
        self.cached_tokens += cached
        self._at(now + seconds, lambda then: self._decode(engine, then))

    def _decode(self, engine: Engine, now: float) -> None:
        asked = engine.queue.popleft()
        step = self.sessions[asked.session][asked.number]
        new, gone = engine.pool.use(step.keys)
        peers.stored(self.index, self.replicas[asked.server], new, gone, now)
        if asked.ticket is not None:
            self.router.answer(asked.ticket, now)
        if isinstance(self.peer, peers.DynamoCost):
            self.peer.prefill_blocks[asked.server] -= len(step.keys)
        engine.num_decoding += 1
        context = engine.num_decoding * step.num_tokens
        seconds = step.num_output * self.timing.step_s((), engine.num_decoding, context)
        self._at(now + seconds, lambda then: self._end(engine, asked, then))
        if engine.queue:
            self._prefill(engine, now)

    def _end(self, engine: Engine, asked: Asked, now: float) -> None:
        engine.num_decoding -= 1
        self.running[asked.server] -= 1
        if asked.ticket is not None:
            self.router.end(asked.ticket, Outcome.STOP, True, now)
        steps = self.sessions[asked.session]
        if isinstance(self.peer, peers.DynamoCost):
            self.peer.active_blocks[asked.server] -= len(steps[asked.number].keys)
        self.stalls[asked.session] += now - asked.at_s
        if asked.number + 1 < len(steps):
            gap_s = steps[asked.number + 1].gap_s
            self._at(now + gap_s, lambda then: self._arrive(asked.session, asked.number + 1, then))
        else:
            self._num_left -= 1
            self.ended_s = now

    def _peer(self, num_servers: int) -> peers.Peer | None:
        made: dict[str, Callable[[], peers.Peer]] = {
            "round_robin": lambda: peers.RoundRobin(num_servers),
            "least_loaded": peers.LeastLoaded,
            "consistent_hash": peers.ConsistentHash,
            "sticky": peers.StickyLeastLoaded,
            "cache_aware": lambda: peers.CacheAware(num_servers),
            "dynamo_cost": lambda: peers.DynamoCost(self.index, self.replicas),
        }
        return made[self.arm]() if self.arm in made else None


def sessions_of(path: Path, num_turns: int) -> list[list[Step]]:
    """The first turns of each recorded trace, in order, with the gaps between them."""
    found: dict[str, list[Any]] = {}
    for turn in load_log(path):
        found.setdefault(turn.trace_id or turn.request_id, []).append(turn)
    sessions: list[list[Step]] = []
    for turns in found.values():
        turns.sort(key=lambda t: t.arrival_s)
        steps: list[Step] = []
        end_s = turns[0].arrival_s
        for turn in turns[:num_turns]:
            if turn.input_tokens > MAX_TOKENS:
                break
            keys = [key_of((block + 1) * 0x9E3779B97F4A7C15) for block in turn.blocks]
            gap_s = min(MAX_GAP_S, max(0.0, turn.arrival_s - end_s))
            steps.append(Step(keys, turn.input_tokens, turn.block_size, min(turn.output_tokens or 100, 1000), gap_s))
            end_s = turn.finish_s if turn.finish_s is not None else turn.arrival_s
        if len(steps) >= 3:
            sessions.append(steps)
    return sessions


def main() -> None:
    """Run the arms on the same sessions, print medians and ratios to the best other arm."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet.virtual", description=main.__doc__)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--servers", type=int, default=16)
    parser.add_argument("--sessions-per-server", type=float, default=6.0)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--spread-s", type=float, default=60.0, help="sessions start within so many seconds")
    parser.add_argument("--restarts", type=float, default=0.0, help="share of servers that restart every minute")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    timing, pool = load(DEFAULT), sessions_of(args.traces, args.turns)
    found: dict[str, list[Result]] = {arm: [] for arm in args.arms.split(",")}
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for seed in seeds:
        lot = Random(seed)
        number = round(args.servers * args.sessions_per_server)
        chosen = lot.sample(pool, number) if number <= len(pool) else lot.choices(pool, k=number)
        starts_s = [lot.uniform(0.0, args.spread_s) for _ in chosen]
        for arm, results in found.items():
            results.append(Fleet(arm, chosen, args.servers, timing, Random(seed)).run(starts_s, args.restarts))
            print(json.dumps({"arm": arm, "seed": seed, **results[-1]._asdict()}), flush=True)
    for arm, results in found.items():
        print(
            json.dumps(
                {"arm": arm, "median": {n: statistics.median(getattr(r, n) for r in results) for n in Result._fields}}
            )
        )
    if args.record:
        print(record.append(_records(found, args, record.origin())))


def _records(found: dict[str, list[Result]], args: argparse.Namespace, origin: record.Origin) -> list[record.Record]:
    kinds = {"tasks_per_hour": ("tasks/h", "higher"), "stall_mean_s": ("s", "lower"), "stall_p95_s": ("s", "lower"),
             "hit_ratio": ("share", "higher"), "spread": ("ratio", "lower")}  # fmt: skip
    params = {"servers": args.servers, "sessions_per_server": args.sessions_per_server, "turns": args.turns,
              "spread_s": args.spread_s, "restarts_a_minute": args.restarts, "traces": args.traces.name}  # fmt: skip
    records: list[record.Record] = []
    for arm, results in found.items():
        for metric, (unit, better) in kinds.items():
            values = sorted(getattr(r, metric) for r in results)
            low, high = values[round(0.2 * (len(values) - 1))], values[round(0.8 * (len(values) - 1))]
            records.append(
                record.Record(
                    question="sim/fleet-restarts" if args.restarts else "sim/fleet",
                    variant=arm,
                    params=params,
                    metric=metric,
                    unit=unit,
                    better=better,
                    n=len(values),
                    p20=low,
                    p50=statistics.median(values),
                    p80=high,
                    source="simulated",
                    seed=None,
                    commit=origin.commit,
                    versions=origin.versions,
                    machine=origin.machine,
                    command=origin.command,
                )
            )
    return records


if __name__ == "__main__":
    main()

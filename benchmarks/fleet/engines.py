"""Engines and their fleet in virtual time, under one way to choose among them.

Prefill is one queue an engine, decode steps run beside it, KV is vLLM's LRU. Only the time of an engine is modelled.
"""

import heapq
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from random import Random
from typing import NamedTuple

from benchmarks.fleet.peers import StickyLeastLoaded
from benchmarks.fleet.pool import Pool
from benchmarks.fleet.sessions import Step
from impala_vllm.core.types import Namespace
from impala_vllm.fleet.places import Replica, ServerId, Tier
from impala_vllm.sim.routers import ROUTERS, Ask, Machines, Peer
from impala_vllm.sim.timing import Timing

ARMS: dict[str, Callable[[Machines], Peer]] = {
    "round_robin": ROUTERS["round-robin"].make,
    "least_loaded": ROUTERS["least-loaded"].make,
    "consistent_hash": ROUTERS["consistent-hash"].make,
    "sticky": StickyLeastLoaded,
    "cache_aware": ROUTERS["cache-aware"].make,
    "dynamo_cost": ROUTERS["dynamo"].make,
    "preble": ROUTERS["preble"].make,
    "impala": ROUTERS["impala"].make,
}
"""By what records call them."""


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
    ask: Ask
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
        self.sessions, self.timing, self.lot = sessions, timing, lot
        self.engines = [Engine(timing, block_tokens) for _ in range(num_servers)]
        self.running = [0] * num_servers
        places = [Replica(ServerId(f"http://s{i}")) for i in range(num_servers)]
        self.peer = ARMS[arm](Machines(places, timing, timing.hbm_tokens, lot))
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

    def _restart(self, now: float, share: float) -> None:
        number = int(share * len(self.engines) + self.lot.random())  # of 8 servers, one in most minutes
        for server in self.lot.sample(range(len(self.engines)), number):
            self.engines[server].pool = Pool(self.timing.hbm_tokens // self.sessions[0][0].block_tokens)
            self.peer.restarted(server)
        self._at(now + 60.0, lambda later: self._restart(later, share))

    def _arrive(self, session: int, number: int, now: float) -> None:
        steps = self.sessions[session]
        step, is_last = steps[number], number == len(steps) - 1
        name = f"{session}.{number}"
        ask = Ask(
            name, str(session), is_last, Namespace(), step.keys, step.block_tokens, step.num_tokens, step.num_output
        )
        server = self.peer.pick(ask, self.running, now)
        self.running[server] += 1
        engine = self.engines[server]
        engine.queue.append(Asked(session, number, server, ask, now))
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
        if new:
            self.peer.stored(asked.server, Tier.HBM, new, now)
        if gone:
            self.peer.removed(asked.server, Tier.HBM, gone)
        self.peer.answered(asked.ask, asked.server, now)
        engine.num_decoding += 1
        context = engine.num_decoding * step.num_tokens
        seconds = step.num_output * self.timing.step_s((), engine.num_decoding, context)
        self._at(now + seconds, lambda then: self._end(engine, asked, then))
        if engine.queue:
            self._prefill(engine, now)

    def _end(self, engine: Engine, asked: Asked, now: float) -> None:
        engine.num_decoding -= 1
        self.running[asked.server] -= 1
        self.peer.ended(asked.ask, asked.server, now)
        steps = self.sessions[asked.session]
        self.stalls[asked.session] += now - asked.at_s
        if asked.number + 1 < len(steps):
            gap_s = steps[asked.number + 1].gap_s
            self._at(now + gap_s, lambda then: self._arrive(asked.session, asked.number + 1, then))
        else:
            self._num_left -= 1
            self.ended_s = now

"""Tiers steered by trace: core's chains and planner over simulated links, as `adapters/vllm/tiers` over real ones.

Host is written through, the cheapest trace's blocks go first; NVMe gets what its gate lets pass; a waiting turn loads
or computes, what is sooner.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from impala_vllm.core.admission import Asking
from impala_vllm.core.chains import Chains
from impala_vllm.core.cost import StepCost
from impala_vllm.core.idle import IdleKv
from impala_vllm.core.planner import NOBODY, NOTHING, Below, Planner, Queue
from impala_vllm.core.reach import below, leading
from impala_vllm.core.traces import Trace
from impala_vllm.core.types import Outcome, TraceId
from impala_vllm.sim.loop import Loop
from impala_vllm.sim.request import Request
from impala_vllm.sim.store import Store
from impala_vllm.sim.tiers import Offered, Room, Tiers

# As in the adapter.
MAX_CHOSEN = 8
WINDOW_S = 0.5
LATE_S, LATE_FACTOR = 1.0, 4.0


class Reach(NamedTuple):
    """What a waiting turn need not compute."""

    tokens: int
    load_s: float


@dataclass(slots=True)
class _Turn:
    trace_id: TraceId
    keys: Sequence[int]
    writes: bool
    may_write: Callable[[], bool | None] | None = None
    """Tells whether it writes, while that is not known yet."""
    hbm_tokens: int = 0
    queue: Queue = NOBODY
    awaited_blocks: int = 0
    asked_blocks: int = 0
    """NVMe was asked for blocks up to here."""
    nvme_tokens: int = 0
    skips_nvme: bool = False


class ImpalaTiers(Tiers):
    """Keys are numbers here, which core's chains take for the hashes an engine would give them."""

    make_store = Store

    def __init__(self, loop: Loop, room: Room, block_size: int, planner: Planner, cost: StepCost, idle: IdleKv) -> None:
        super().__init__(loop, room)
        self.changed: dict[TraceId, None] = {}
        """Traces whose blocks below HBM came or went; the reader clears it."""
        self._loop = loop
        self._size = block_size
        self._planner = planner
        self._cost = cost
        self._host_pays = True
        self._host_chains: Any = Chains(room.host_blocks, idle.worth_in_host)
        self._nvme_chains: Any = Chains(room.nvme_blocks, idle.worth_in_nvme)
        self._turns: dict[Request, _Turn] = {}
        self._keys: dict[TraceId, Sequence[int]] = {}
        self._late_s: dict[int, float] = {}
        """By block that NVMe is read for: when nobody waits for it any more."""
        self._undecided: set[TraceId] = set()
        """In a first turn of which it is not known whether it belongs on NVMe: host keeps what it has of them."""

    def arrive(self, request: Request, trace: Trace, stem: int) -> None:
        """A turn of `trace` is about to wait; others share its first `stem` blocks."""
        if trace.num_turns == 2 and trace.last_outcome is not None:
            self._planner.resumed(trace.opening, trace.last_outcome)
        keys = request.keys[: request.prompt_tokens // self._size]
        writes = self._planner.writes(trace.num_turns, trace.opening)
        turn = self._turns[request] = _Turn(trace.trace_id, keys, bool(writes))
        if writes is None and self.room.nvme_blocks:
            turn.may_write = partial(self._planner.writes, trace.num_turns, trace.opening)
            self._undecided.add(trace.trace_id)
        self._use(turn, stem)

    def ended(self, request: Request, trace: Trace | None, stem: int, outcome: Outcome) -> None:
        """The turn is done. None: its trace was forgotten meanwhile."""
        turn = self._turns.pop(request)
        self._undecided.discard(turn.trace_id)
        if trace is None:
            return
        self._decide(turn, self._planner.ended(trace.num_turns, trace.opening, outcome, turn.writes, self._loop.now))
        turn.keys = request.keys[: (request.turn.num_tokens - 1) // self._size]
        self._use(turn, stem)

    def forget(self, trace_id: TraceId) -> None:
        """The trace left the table."""
        self._host_chains.release(trace_id)
        self._nvme_chains.release(trace_id)
        self._undecided.discard(trace_id)
        if self._keys.pop(trace_id, None) is not None:
            self.changed[trace_id] = None

    def rank_reach(self, request: Request, hbm_blocks: int) -> Reach:
        """How far the waiting turn gets without computing; decides what it waits for."""
        turn = self._turns[request]
        turn.hbm_tokens = hbm_blocks * self._size
        return self._choose(turn, request.num_tokens)

    def choose(self, requests: Sequence[Request], asks: Sequence[Asking], num_running: int) -> list[Asking]:
        """Start reads from NVMe for waiting turns, best first. Returns those that may run now."""
        self._host_pays = self._planner.host_pays()
        if not self.room.nvme_blocks:
            return list(asks)
        ready: list[Asking] = []
        before: set[TraceId] = set()
        turns = [self._turns[request] for request in requests]
        num_reading = sum(turn.nvme_tokens > 0 for turn in turns)
        num_computing = len(asks) + num_running - num_reading
        compute_s, nvme_tokens = 0.0, 0
        for index, (turn, ask) in enumerate(zip(turns, asks, strict=True)):
            is_reading = turn.nvme_tokens > 0
            num_reading -= is_reading
            num_computing -= not is_reading
            turn.queue = Queue(compute_s, nvme_tokens, num_computing, num_reading)
            if index < MAX_CHOSEN:
                self._choose(turn, ask.turn.prompt_tokens)
            if self._is_ready(turn, before):
                ready.append(ask)
            before.add(turn.trace_id)
            compute_s += self._cost.prefill_s(ask.turn.prompt_tokens, ask.turn.reach_tokens)
            nvme_tokens += turn.nvme_tokens
        return ready

    def below(self, trace_id: TraceId) -> Below:
        """What lies below HBM of the trace's newest turn."""
        return self._below(self._keys.get(trace_id, ()), 0)

    def ready_end(self, request: Request, start: int, limit: int) -> int | None:
        if not self._host_pays:
            return start
        end = start
        while end < limit and self.host.is_ready(request.keys[end]):
            end += 1
        late_s = self._late_s.get(request.keys[end]) if end < limit else None
        if late_s is not None and end < self._turns[request].awaited_blocks and self._loop.now <= late_s:
            return None
        return end

    def load(self, request: Request, start: int, keys: Sequence[int], done: Callable[[], None]) -> None:
        self._planner.host.queued_bytes += len(keys) * self.room.block_bytes
        super().load(request, start, keys, done)

    def has_loaded(self, keys: Sequence[int], took_s: float) -> None:
        num_bytes = len(keys) * self.room.block_bytes
        self._planner.host.queued_bytes -= num_bytes
        self._planner.host.observe(num_bytes, took_s)

    def used(self, keys: Sequence[int]) -> None:
        """`ended` says more."""

    def offer(self, request: Request, keys: Sequence[int], offered: Offered) -> bool:
        turn = self._turns.get(request)
        if turn is None:
            return True  # it has ended, and all of it was offered
        fresh = [k for k in keys if k not in self.host]
        limit = None if self.room.nvme_blocks else turn.trace_id
        self._make_room(len(fresh) - self.host.num_free, request.keys, (turn.trace_id,), limit)
        fitting = fresh[: self.host.num_free]
        if fitting:
            self.store(request, fitting, partial(self._came, turn, fitting))
        return True

    def _use(self, turn: _Turn, stem: int) -> None:
        self._host_chains.use(turn.trace_id, turn.keys, stem)
        self._nvme_chains.use(turn.trace_id, turn.keys, stem)
        self._keys[turn.trace_id] = turn.keys
        self.changed[turn.trace_id] = None
        if turn.writes:
            self._write([k for k in turn.keys if self.host.is_ready(k)], turn.trace_id)

    def _choose(self, turn: _Turn, prompt_tokens: int) -> Reach:
        start = turn.hbm_tokens // self._size
        found = self._below(turn.keys, start)
        if turn.skips_nvme:
            found = Below(found.host_tokens)
        queue, behind = turn.queue, start + found.host_tokens // self._size
        if found.nvme_tokens and behind < turn.asked_blocks and turn.keys[behind] in self._late_s:
            queue = queue._replace(coming_tokens=(turn.asked_blocks - behind) * self._size)
        way = self._planner.way(prompt_tokens - 1, turn.hbm_tokens, found, queue)
        loaded = way.host_tokens + way.nvme_tokens
        turn.awaited_blocks, turn.nvme_tokens = start + loaded // self._size, way.nvme_tokens
        reach = min(max(turn.hbm_tokens, turn.awaited_blocks * self._size), prompt_tokens - 1)
        return Reach(reach, self._planner.load_s(way.host_tokens, way.nvme_tokens) if loaded else 0.0)

    def _is_ready(self, turn: _Turn, before: set[TraceId]) -> bool:
        keys = turn.keys
        behind = leading(keys, self.host.ready.__contains__, turn.hbm_tokens // self._size)
        if behind >= min(turn.awaited_blocks, len(keys)):
            return True
        late_s = self._late_s.get(keys[behind])
        if late_s is not None:
            turn.skips_nvme = self._loop.now > late_s
            return turn.skips_nvme
        if not self.nvme.is_ready(keys[behind]):
            return True
        if self._planner.nvme.wait_s() > WINDOW_S:
            return False
        wanted = keys[behind : leading(keys, self.nvme.ready.__contains__, behind)]
        if not self._read_in(wanted, turn.trace_id, before):
            # With nobody before it and nothing on its way there will be no more room than now.
            turn.skips_nvme = not before and not self._late_s
        else:
            turn.asked_blocks = behind + len(wanted)
        return turn.skips_nvme

    def _read_in(self, keys: Sequence[int], trace_id: TraceId, spared: Collection[TraceId]) -> bool:
        """Read from NVMe into host, at the cost of whatever is worth least but for `spared`."""
        wanted = [k for k in keys if k not in self.host and self.nvme.is_ready(k)]
        self._make_room(len(wanted) - self.host.num_free, keys, (*spared, trace_id))
        fitting = wanted[: self.host.num_free]
        if not fitting:
            return False
        num_bytes, link = len(fitting) * self.room.block_bytes, self._planner.nvme
        link.queued_bytes += num_bytes
        late_s = self._loop.now + max(LATE_S, LATE_FACTOR * link.wait_s())
        self._late_s.update(dict.fromkeys(fitting, late_s))

        def came(took_s: float) -> None:
            link.queued_bytes -= num_bytes
            link.observe(num_bytes, took_s)
            self._host_chains.add(fitting, trace_id)
            for key in fitting:
                del self._late_s[key]
            self.changed[trace_id] = None

        self.read(fitting, came)
        return True

    def _came(self, turn: _Turn, keys: Sequence[int]) -> None:
        self._host_chains.add(keys, turn.trace_id)
        self.changed[turn.trace_id] = None
        if turn.may_write is not None:
            self._decide(turn, turn.may_write())
            keys = turn.keys
        if turn.writes:
            self._write([k for k in keys if self.host.is_ready(k)], turn.trace_id)

    def _decide(self, turn: _Turn, writes: bool | None) -> None:
        turn.writes = bool(writes)
        if writes is not None:
            turn.may_write = None
            self._undecided.discard(turn.trace_id)

    def _write(self, keys: Sequence[int], trace_id: TraceId) -> None:
        fresh = [k for k in keys if k not in self.nvme]
        if not fresh or not self.room.nvme_blocks:
            return
        wished = set(fresh)
        victims = self._nvme_chains.victims(
            max(0, len(fresh) - self.nvme.num_free),
            lambda some: [k for k in some if k not in wished and self.nvme.may_go(k)],
            only_cheaper_than=trace_id,
        )
        self._drop(victims, self._nvme_chains, self.nvme)
        fitting = fresh[: self.nvme.num_free]
        if not fitting:
            return

        def written() -> None:
            self._nvme_chains.add(fitting, trace_id)
            self.changed[trace_id] = None

        self.write(fitting, written)

    def _make_room(
        self, lacking: int, wished: Iterable[int], spared: Collection[TraceId], limit: TraceId | None = None
    ) -> None:
        if lacking > 0:
            chains, kept = self._host_chains, set(wished)
            victims = chains.victims(
                lacking,
                lambda some: [k for k in some if k not in kept and self.host.may_go(k)],
                spared,
                limit,
                self._undecided,
            )
            self._drop(victims, chains, self.host)

    def _drop(self, keys: Iterable[int], chains: Any, store: Any) -> None:
        for key in keys:
            owner = chains.trace_of(key)
            if owner is not None:
                self.changed[owner] = None
        store.evict(keys)
        chains.drop(keys)

    def _below(self, keys: Sequence[int], start: int) -> Below:
        if not keys:
            return NOTHING
        return below(keys, start, self._size, self.host.ready.__contains__, self.nvme.ready.__contains__)

"""This project's policy: core's own objects, told what a replica does as `adapters/vllm/enforcer.py` tells them.

Traces are recognised from block keys alone; no session id is read.
"""

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

from impala_vllm.config import Config
from impala_vllm.core.admission import Admission
from impala_vllm.core.cost import StepCost
from impala_vllm.core.gaps import GapForecast
from impala_vllm.core.identity import Identity
from impala_vllm.core.idle import IdleKv
from impala_vllm.core.lengths import OutputLengths
from impala_vllm.core.open_turns import OpenTurns
from impala_vllm.core.planner import NOTHING, Planner
from impala_vllm.core.retention import Retention
from impala_vllm.core.types import Arrival, Finish, RequestId, TraceId
from impala_vllm.sim.eviction import ByTrace
from impala_vllm.sim.loop import Loop
from impala_vllm.sim.policies.asks import Asks, Judged
from impala_vllm.sim.policies.impala_tiers import ImpalaTiers, Reach
from impala_vllm.sim.policy import Policy
from impala_vllm.sim.request import Request
from impala_vllm.sim.tiers import Room, Tiers

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica

# As in the adapter.
REFRESH_S, REFRESH_S_PER_TRACE = 1.0, 2e-3
ROUND_S_PER_CHAIN = 1e-4

REPLAN_S, REPLAN_SHARE = 0.1, 0.05
"""An engine plans every step; here, while nothing else happens, so often or in this share of the longest prefill that
waits. Planning every step changed mean stall by 3 % or less over five seeds (16 sessions, 4x, cpu-26m)."""


class Impala(Policy):
    """Rank, admission, retention and the estimates they need, for one replica."""

    replan_s = REPLAN_S
    """None in a step that is full anyway."""

    def __init__(self, replica: "Replica", config: Config | None = None, gaps: GapForecast | None = None) -> None:
        """`gaps` in place of the forecast that is learned."""
        super().__init__(replica)
        config = config or Config()
        self.gaps = gaps or GapForecast(config.gaps)
        self.cost = StepCost(config.cost)
        self.lengths = OutputLengths()
        self.admission = Admission(self.cost, config.rank.hold_s, config.admission)
        below, size = replica.shape.below, replica.shape.block_size
        self._planner = None
        if below is not None:
            self._planner = Planner(self.cost, below.block_bytes / size, config.planner)
        self.idle_kv = IdleKv(self.gaps, self.admission, Retention(self.cost, config.retention), self._planner)
        self.below: ImpalaTiers | None = None
        self.identity = Identity(config.identity)
        self.identity.on_forget = self._forget
        self.order = self.idle = ByTrace(self.idle_kv.cheapest_first)  # type: ignore[arg-type]  # a TraceId is a str
        self.turns: OpenTurns[Judged] = OpenTurns(self.gaps, self.lengths)
        self._refreshed_s = self._round_s = 0.0
        self._num_steps = 0
        """Since idle KV was judged again: an engine does a part of that every step."""
        reach = self._rank_reach if below is not None else None
        self._asks = Asks(replica, self.turns, self.cost, self.lengths, config.rank, reach)

    def tiers(self, loop: Loop, room: Room) -> Tiers:
        assert self._planner is not None
        size = self.replica.shape.block_size
        self.below = ImpalaTiers(loop, room, size, self._planner, self.cost, self.idle_kv)
        return self.below

    def arrive(self, request: Request, now: float) -> None:
        turn = request.turn
        prompt = turn.keys[: turn.prompt_tokens // self.replica.shape.block_size]
        name = RequestId(request.request_id)
        trace_id = self.identity.arrive(Arrival(name, prompt, turn.prompt_tokens, turn.namespace), now).trace_id
        trace = self.identity.traces.get(trace_id)
        parent = trace.parent_trace_id if trace is not None else None
        self.turns.arrive(name, Judged(trace_id, now), turn.prompt_tokens, now, parent)
        if self.below is not None and trace is not None:
            self.below.arrive(request, trace, self.identity.shared_depth(name))

    def placed(self, request: Request, now: float) -> None:
        turn = self._turn(request)
        if not self.turns.begin(turn) or turn.trace_id is None:
            return
        # What the turn did not take of its trace's KV is superseded, as in the adapter.
        self.order.release(turn.trace_id)
        if self.below is not None:
            self.below.changed[turn.trace_id] = None

    def finish(self, request: Request, now: float) -> None:
        turn, name = request.turn, RequestId(request.request_id)
        self.identity.finish(Finish(name, turn.keys, turn.num_tokens, turn.outcome), now)
        signature = f"tool:{turn.tool}" if turn.tool else turn.outcome.value
        ended = self.turns.finish(name, turn.num_tokens, request.num_output, signature, now)
        assert ended is not None
        trace = self.identity.traces.get(self.turns.trace_of(ended))
        if trace is not None:
            parent = self.identity.traces.drained_by(trace)
            if parent is not None:
                self.turns.drain(parent, now)
        if self.below is not None:
            self.below.ended(request, trace, ended.stem_blocks, turn.outcome)

    def owner(self, request: Request) -> tuple[str | None, int]:
        turn = self._turn(request)
        turn.stem_blocks = self.identity.shared_depth(RequestId(request.request_id))
        return turn.trace_id, turn.stem_blocks

    def trace_of(self, request: Request) -> TraceId | None:
        """Whose turn an open request was taken for."""
        return self._turn(request).trace_id

    def plan(self, now: float) -> Iterable[Request]:
        self.identity.tick(now)
        if now - self._refreshed_s >= REFRESH_S + REFRESH_S_PER_TRACE * self.turns.num_traces:
            self.gaps.refresh(now)
            self._refreshed_s = now
        self._judge_idle(now)
        self.held = ()
        if not self.replica.waiting and not self.replica.preempted:
            return ()
        if self.below is None and self.replica.is_full:
            self.replan_s = None  # whoever is admitted would not be placed; with tiers, reads begin for who waits
            return ()
        return self._admit(now)

    def order_running(self) -> None:
        running = self.replica.running
        if len(running) > 1 and any(r.is_prefilling for r in running):
            running.sort(key=lambda r: r.num_tokens - r.num_computed if r.is_prefilling else 0)

    def stepped(self, step_s: float, prefill: int, context: float, count: int) -> None:
        self._num_steps += count
        if prefill:
            self.cost.observe(step_s, prefill, context)
        else:
            self.cost.observe_decodes(step_s, count)

    def _judge_idle(self, now: float) -> None:
        order = self.order
        notes: list[dict[TraceId, None]] = [order.changed, self.turns.changed]  # type: ignore[list-item]
        if self.below is not None:
            notes.append(self.below.changed)
        changed = dict.fromkeys(chain.from_iterable(notes))
        for note in notes[1:]:
            note.clear()
        for trace_id in changed:
            is_open = self.turns.is_open(trace_id)
            if is_open:
                order.spare(trace_id)
            num_blocks, num_tokens = order.num_claimed(trace_id), self.turns.num_tokens(trace_id)
            below = NOTHING
            if self.below is not None:
                below = self.below.below(trace_id)
            self.idle_kv.update(trace_id, num_blocks, num_tokens, is_open, now, below, self.turns.runs(trace_id))
        order.changed.clear()
        if self.replica.waiting or self.replica.preempted:
            for _ in range(max(1, self._num_steps)):
                self.idle_kv.refresh(now)
        self._num_steps = 0
        if now - self._round_s >= ROUND_S_PER_CHAIN * len(self.idle_kv):
            order.new_round()
            self._round_s = now

    def _admit(self, now: float) -> list[Request]:
        requests, asks = self._asks.ranked(now)
        longest = max(a.turn.prompt_tokens for a in asks)
        self.replan_s = max(REPLAN_S, REPLAN_SHARE * self.cost.prefill_s(longest))
        pool, num_free, num_running = self.replica.pool, self.replica.pool.num_free, len(self.replica.running)
        if self.below is not None:
            asks = self.below.choose(requests, asks, num_running)
            # Loads hold only what they load; the rest of their prompts is promised room.
            num_free -= self.replica.promised_blocks()
            num_running += len(self.replica.loading) + len(self.replica.loaded)
        room = sum(a.new_blocks + a.own_idle_blocks for a in asks)
        is_enough = room <= pool.num_blank + self.order.num_unclaimed
        kept = 0 if is_enough else self.idle_kv.kept_blocks
        plan = self.admission.plan(asks, kept, num_free, num_running, now)
        admitted = {a.turn.request_id for a in plan.admitted}
        self.held = [r for r in requests if r.request_id not in admitted]
        return [r for r in requests if r.request_id in admitted]

    def _rank_reach(self, request: Request, hbm_blocks: int) -> Reach:
        assert self.below is not None
        return self.below.rank_reach(request, hbm_blocks)

    def _turn(self, request: Request) -> Judged:
        return self.turns[RequestId(request.request_id)]

    def _forget(self, trace_id: TraceId) -> None:
        self.turns.forget(trace_id)
        if self.below is not None:
            self.below.forget(trace_id)
        self.order.release(trace_id)

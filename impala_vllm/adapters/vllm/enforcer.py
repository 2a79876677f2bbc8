"""Carries the policy of core into vLLM's queues: once a step, in front of `schedule()`.

Translates waiting requests and idle KV into core's facts, asks rank and admission, hands the plan to the
waiting queue, and answers the free queue's question whose KV goes first. Runs on the engine loop's thread.
"""

from itertools import chain
from typing import TYPE_CHECKING

from vllm.v1.core.sched.request_queue import SchedulingPolicy

from impala_vllm.adapters.vllm import facts
from impala_vllm.adapters.vllm.asks import Asks
from impala_vllm.adapters.vllm.claims import Claims
from impala_vllm.adapters.vllm.free_queue import FreeQueue
from impala_vllm.adapters.vllm.gate import Gate
from impala_vllm.adapters.vllm.step_timer import StepTimer
from impala_vllm.adapters.vllm.tiers.policy import TierPolicy
from impala_vllm.core.admission import Admission
from impala_vllm.core.cost import StepCost
from impala_vllm.core.gaps import GapForecast
from impala_vllm.core.idle import IdleKv
from impala_vllm.core.lengths import OutputLengths
from impala_vllm.core.open_turns import OpenTurn, OpenTurns
from impala_vllm.core.planner import NOTHING
from impala_vllm.core.retention import Retention
from impala_vllm.core.signature import Signatures
from impala_vllm.core.traces import Trace, TraceTable
from impala_vllm.core.types import Outcome, RequestId, TraceId

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from impala_vllm.config import Config

REFRESH_S, REFRESH_S_PER_TRACE = 1.0, 2e-3
"""How often the gap forecast learns anew from what is still silent: less often where that is much."""

ROUND_S_PER_CHAIN = 1e-4
"""An order of eviction is good for so long: asking anew costs time for each chain."""


class Enforcer:
    """Policy objects, and the two queues they steer."""

    def __init__(
        self, scheduler: "Scheduler", config: "Config", tool_call_tokens: frozenset[int] = frozenset()
    ) -> None:
        self._scheduler = scheduler
        self.gaps = GapForecast(config.gaps)
        self.cost = StepCost(config.cost)
        self.lengths = OutputLengths()
        self._signatures = Signatures()
        self._tool_call_tokens = tool_call_tokens
        self.admission = Admission(self.cost, config.rank.hold_s, config.admission)
        self.tiers = TierPolicy.of(scheduler, self.cost, config.planner)
        planner = self.tiers.planner if self.tiers is not None else None
        self.idle = IdleKv(self.gaps, self.admission, Retention(self.cost, config.retention), planner)
        self._supersedes = config.retention.supersede
        if self.tiers is not None:
            self.tiers.manager.attach(self.idle, self.tiers.planner, self._supersedes)
        self.traces: TraceTable | None = None
        """Who is whose child, where identity is on."""
        self.longest_wait_s = 0.0
        self.turns: OpenTurns[OpenTurn] = OpenTurns(self.gaps, self.lengths)
        self._refreshed_s = 0.0
        self._round_s = 0.0
        self._timer = StepTimer(self.cost)
        self._fault: Exception | None = None
        """Of ours, inside vLLM's own step; raised by the next plan."""
        self.free: FreeQueue | None = None
        if len(scheduler.kv_cache_config.kv_cache_groups) == 1 and scheduler.cache_config.enable_prefix_caching:
            pool = scheduler.kv_cache_manager.block_pool
            self.free = FreeQueue(pool.free_block_queue, self._cheapest_first)
            pool.free_block_queue = self.free  # type: ignore[assignment]
        self.claims = Claims(scheduler, self.turns, self.free)
        self._goes_by_priority = scheduler.policy == SchedulingPolicy.PRIORITY
        self.asks = Asks(scheduler, self.turns, self.cost, self.lengths, config.rank, self.tiers)
        self.gate = Gate(scheduler, self.asks, self.admission, self.idle, self.free, self.tiers)

    def arrive(
        self, request: "Request", trace_id: TraceId | None, now: float, stem_blocks: int = 0, trace: Trace | None = None
    ) -> None:
        """`request` is about to be queued, a turn of `trace`; others share its first `stem_blocks`.

        One more sample of a turn has a `trace_id` and no `trace`.
        """
        parent = trace.parent_trace_id if trace is not None else None
        turn = OpenTurn(trace_id, now, is_sample=trace_id is not None and trace is None)
        self.turns.arrive(RequestId(request.request_id), turn, request.num_tokens, now, parent)
        if self.tiers is not None:
            self.tiers.arrive(request, trace, stem_blocks)

    def finish(self, request: "Request", now: float, trace: Trace | None = None, stem_blocks: int = 0) -> None:
        """`request`, a turn of `trace`, has ended; its blocks are free, or will be when its connector is done."""
        waiting = self.turns.get(RequestId(request.request_id))
        if waiting is not None:
            self._begun(waiting)
        outcome = facts.outcome(request, self._tool_call_tokens)
        is_answer = request.sampling_params is not None and outcome not in (Outcome.ABORT, Outcome.ERROR)
        num_output = request.num_output_tokens if is_answer else None
        turn = self.turns.finish(
            RequestId(request.request_id), request.num_tokens, num_output, self._signature(request), now
        )
        if turn is None:
            return
        if request.request_id in self._scheduler.requests:
            self.claims.keep(request, turn, stem_blocks)
        is_known = self.turns.trace_of(turn) is not None
        is_known = is_known and not turn.is_sample
        if is_known and self.traces is not None and trace is not None:
            parent = self.traces.drained_by(trace)
            if parent is not None:
                self.turns.drain(parent, now)
        if self.tiers is not None:
            self.tiers.finish(request, trace if is_known else None, turn.stem_blocks, outcome, now)

    def trace_of(self, request: "Request") -> TraceId | None:
        """Whose turn an open request is."""
        turn = self.turns.get(RequestId(request.request_id))
        return turn.trace_id if turn is not None else None

    def forget(self, trace_id: TraceId) -> None:
        """The trace left the table."""
        self.turns.forget(trace_id)
        if self.tiers is not None:
            self.tiers.manager.forget(trace_id)
        if self.free is not None:
            self.free.release(trace_id)

    def reset(self) -> None:
        """The prefix cache is empty: nothing idle is anybody's."""
        if self.free is not None:
            self.free.release_all()

    def forget_all(self) -> None:
        """There are no traces any more: nothing idle is anybody's, here and below HBM."""
        self.turns.forget_all()
        self.reset()
        if self.tiers is not None:
            self.tiers.manager.forget_all()

    def retire(self) -> None:
        """Give vLLM its own queues' behaviour back: its scheduling policy, least recently used goes first."""
        self.gate.retire()
        if self.tiers is not None:
            self.tiers.manager.detach()
        self.claims.unclaim()
        self.reset()

    def plan(self, now: float) -> None:
        """Decide this step: order what runs, order and admit what waits. Raises whatever went wrong since the last."""
        if self._fault is not None:
            raise self._fault
        if now - self._refreshed_s >= REFRESH_S + REFRESH_S_PER_TRACE * self.turns.num_traces:
            self.gaps.refresh(now)
            self._refreshed_s = now
        if self.free is not None:
            self._judge_idle(self.free, now)
        running = self._scheduler.running
        if len(running) > 1 and self._scheduler._inflight_prefills:
            running.sort(key=self._place_in_step)
        self.gate.plan(now)

    def scheduled(self, output: "SchedulerOutput", now: float, is_throttled: bool = False) -> None:
        """A step was built: note what it will compute, to learn from when it is done. `is_throttled`: it was to place
        no prefill. Raises Stalled."""
        for new in output.scheduled_new_reqs:
            turn = self.turns.get(RequestId(new.req_id))
            if turn is not None and not turn.has_begun:  # model runner V2 calls resumed ones new as well
                self.longest_wait_s = max(self.longest_wait_s, now - turn.arrived_s)
                self._begun(turn)
                if self._supersedes and self.free is not None and turn.trace_id is not None and not turn.is_sample:
                    # What the turn did not take of its trace's KV is superseded: nobody goes on from there.
                    self.free.release(turn.trace_id)
        self.gate.stepped(output, now, is_throttled)
        self._timer.planned(output, now)

    def stepped(self, output: "SchedulerOutput", now: float, moved: "KVConnectorOutput | None" = None) -> None:
        """A step is done."""
        if self.tiers is not None and moved is not None:
            self.tiers.moved(moved)
        self._timer.ended(output, now)

    def _signature(self, request: "Request") -> str:
        """What the turn ended with: a tool, where the engine can see it, else the reason vLLM gives."""
        call = facts.called(request, self._tool_call_tokens)
        if call:
            return self._signatures.of(call) or "tool"
        return str(request.get_finished_reason())

    def _begun(self, turn: OpenTurn) -> None:
        """The turn waits no longer."""
        if self.turns.begin(turn) and turn.trace_id is not None and self.tiers is not None:
            self.tiers.manager.turns.changed(turn.trace_id)

    def _judge_idle(self, free: FreeQueue, now: float) -> None:
        notes = [free.changed, self.turns.changed]
        if self.tiers is not None:
            notes.append(self.tiers.manager.turns.changed_traces)
        changed = dict.fromkeys(chain.from_iterable(notes))
        for note in notes[1:]:
            note.clear()
        for trace_id in changed:
            is_open = self.turns.is_open(trace_id)
            if is_open:
                free.spare(trace_id)
            num_blocks, num_tokens = free.num_claimed(trace_id), self.turns.num_tokens(trace_id)
            below = NOTHING
            if self.tiers is not None:
                below = self.tiers.below(trace_id)
            self.idle.update(trace_id, num_blocks, num_tokens, is_open, now, below, self.turns.runs(trace_id))
        free.changed.clear()
        if len(self.gate.waiting):
            self.idle.refresh(now)
        if now - self._round_s >= ROUND_S_PER_CHAIN * len(self.idle):
            free.new_round()
            self._round_s = now

    def _place_in_step(self, request: "Request") -> tuple[int, int]:
        """Running prefills with the least left first, the client's priority before."""
        left = request.num_tokens - request.num_computed_tokens if request.is_prefill_chunk else 0
        return (request.priority if self._goes_by_priority else 0), left

    def _cheapest_first(self, trace_ids: "Iterable[TraceId]") -> list[TraceId]:
        """`IdleKv`'s answer; where it fails, amid vLLM's step, any order will do."""
        trace_ids = list(trace_ids)
        try:
            return self.idle.cheapest_first(trace_ids)
        except Exception as e:
            self._fault = e
            return trace_ids

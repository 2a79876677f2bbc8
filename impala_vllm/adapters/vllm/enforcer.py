"""Carries the policy of core into vLLM's queues: once a step, in front of `schedule()`.

Translates waiting requests and idle KV into core's facts, asks rank and admission, hands the plan to the
waiting queue, and answers the free queue's question whose KV goes first. Runs on the engine loop's thread.
"""

from itertools import chain
from typing import TYPE_CHECKING

from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.request import RequestStatus

from impala_vllm.adapters.vllm import facts
from impala_vllm.adapters.vllm.asks import Asks
from impala_vllm.adapters.vllm.free_queue import FreeQueue
from impala_vllm.adapters.vllm.step_timer import StepTimer
from impala_vllm.adapters.vllm.tiers.policy import TierPolicy
from impala_vllm.adapters.vllm.waiting_queue import WaitingQueue
from impala_vllm.adapters.vllm.watchdog import Watchdog
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
    from collections.abc import Iterable, Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from impala_vllm.config import Config
    from impala_vllm.core.admission import Asking

REFRESH_S, REFRESH_S_PER_TRACE = 1.0, 2e-3
"""How often the gap forecast learns anew from what is still silent: less often where that is much."""

_NOBODY: frozenset[str] = frozenset()

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
        self.num_held = 0
        self._planned: tuple[Sequence[Request], list[Request]] = (), []
        """Who waited for this step, and who of them was let through."""
        self._fetching: frozenset[str] = _NOBODY
        self.longest_wait_s = 0.0
        self.turns: OpenTurns[OpenTurn] = OpenTurns(self.gaps, self.lengths)
        self._unfreed: dict[str, OpenTurn] = {}
        """Ended, but their connector still wants their blocks; by request id."""
        self._deferred: dict[int, tuple[OpenTurn, frozenset[int]]] = {}
        """Turns and their shared blocks, by the identity of an entry of vLLM's deferred frees."""
        self._claimer: OpenTurn | None = None
        self._num_deferred = 0
        self._refreshed_s = 0.0
        self._round_s = 0.0
        self._num_ranked = 0
        self._watchdog = Watchdog(scheduler, self.tiers)
        self._timer = StepTimer(self.cost)
        self._asks = Asks(scheduler, self.turns, self.cost, self.lengths, config.rank, self.tiers)
        self.waiting = WaitingQueue(scheduler.waiting)
        scheduler.waiting = self.waiting
        self._fault: Exception | None = None
        """Of ours, inside vLLM's own step; raised by the next plan."""
        self._num_free = 0
        self.free: FreeQueue | None = None
        if len(scheduler.kv_cache_config.kv_cache_groups) == 1 and scheduler.cache_config.enable_prefix_caching:
            pool = scheduler.kv_cache_manager.block_pool
            self.free = FreeQueue(pool.free_block_queue, self._cheapest_first)
            pool.free_block_queue = self.free  # type: ignore[assignment]

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
            turn.stem_blocks = stem_blocks
            self._unfreed[request.request_id] = turn
        is_known = self.turns.trace_of(turn) is not None
        is_known = is_known and not turn.is_sample
        if is_known and self.traces is not None and trace is not None:
            parent = self.traces.drained_by(trace)
            if parent is not None:
                self.turns.drain(parent, now)
        if self.tiers is not None:
            self.tiers.finish(request, trace if is_known else None, turn.stem_blocks, outcome)

    def kept_back(self) -> tuple[frozenset[str], frozenset[str]]:
        """Requests held by admission in this step's plan, and those not in it because their KV is read from NVMe.

        O(waiting): for the ledger, which asks once a step.
        """
        waited, admitted = self._planned
        if self.num_held <= len(self._fetching):
            return _NOBODY, self._fetching
        held = frozenset(r.request_id for r in waited).difference(self._fetching, [r.request_id for r in admitted])
        return held, self._fetching

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

    def claim(self, request: "Request", stem_blocks: int) -> None:
        """The blocks freed until `unclaim` are the request's; its first `stem_blocks` are shared with others."""
        turn = self.turns.get(RequestId(request.request_id))
        if turn is not None:
            turn.stem_blocks = stem_blocks
        else:
            turn = self._unfreed.pop(request.request_id, None)
        if self.free is None or turn is None:
            return
        self._claimer, self._num_deferred = turn, len(self._scheduler.deferred_frees)
        self.free.claim = self.turns.trace_of(turn)
        if turn.stem_blocks and self.free.claim is not None:
            blocks = self._scheduler.kv_cache_manager.get_block_ids(request.request_id)[0]
            self.free.stem_blocks = frozenset(blocks[: turn.stem_blocks])

    def unclaim(self) -> None:
        """What vLLM has put off freeing keeps its claim, for `reclaim`."""
        if self.free is None:
            return
        deferred = self._scheduler.deferred_frees
        if self._claimer is not None and len(deferred) > self._num_deferred:
            self._deferred[id(deferred[-1][1])] = self._claimer, self.free.stem_blocks
        self._claimer = None
        self.free.claim, self.free.stem_blocks = None, frozenset()

    def reclaim(self, blocks: "Sequence[KVCacheBlock]") -> None:
        """`claim` for an entry of vLLM's deferred frees, which is freed now."""
        turn, stem_blocks = self._deferred.pop(id(blocks), (None, frozenset[int]()))
        if self.free is not None and turn is not None:
            self.free.claim, self.free.stem_blocks = self.turns.trace_of(turn), stem_blocks

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
        waiting = create_request_queue(self._scheduler.policy)
        requests = list(self.waiting)
        for request in [r for r in requests if r.status != RequestStatus.PREEMPTED]:
            waiting.add_request(request)
        waiting.prepend_requests(r for r in requests if r.status == RequestStatus.PREEMPTED)
        self._scheduler.waiting = waiting
        self._scheduler.deferred_waiting.difference_update(self._planned[0])
        if self.tiers is not None:
            self.tiers.manager.detach()
        self.unclaim()
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
        if not len(self.waiting):
            self._planned, self._fetching = ((), []), _NOBODY
            self.num_held = self._num_ranked = 0
            self.waiting.admit(())
            return
        self._admit(now)

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
        if output.total_num_scheduled_tokens:
            self._asks.skipped.clear()
        num_free = self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        has_placed = output.scheduled_new_reqs or output.scheduled_cached_reqs.resumed_req_ids
        self.waiting.stepped(bool(has_placed) or num_free > self._num_free, is_throttled)
        self._num_free = num_free
        self._watchdog.watch(output, self._num_ranked, now)
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
        if len(self.waiting):
            self.idle.refresh(now)
        if now - self._round_s >= ROUND_S_PER_CHAIN * len(self.idle):
            free.new_round()
            self._round_s = now

    def _place_in_step(self, request: "Request") -> tuple[int, int]:
        """Running prefills with the least left first, the client's priority before."""
        left = request.num_tokens - request.num_computed_tokens if request.is_prefill_chunk else 0
        return (request.priority if self._asks.goes_by_priority else 0), left

    def _cheapest_first(self, trace_ids: "Iterable[TraceId]") -> list[TraceId]:
        """`IdleKv`'s answer; where it fails, amid vLLM's step, any order will do."""
        trace_ids = list(trace_ids)
        try:
            return self.idle.cheapest_first(trace_ids)
        except Exception as e:
            self._fault = e
            return trace_ids

    def _admit(self, now: float) -> None:
        passing, requests, asks = self._asks.ranked(self.waiting, now)
        fetching: frozenset[str] = _NOBODY
        if self.tiers is not None:
            ready = self.tiers.load(asks, now)
            if len(ready) < len(asks):
                fetching = frozenset(a.turn.request_id for a in asks).difference(a.turn.request_id for a in ready)
            asks = ready
        request_of = self._scheduler.requests
        if self._watchdog.lets_all_through:
            others, fetching = set(passing), _NOBODY
            requests = admitted = [request for request in self.waiting if request not in others]
        elif self.free is None or not self._asks.knows_reach:
            admitted = [request_of[ask.turn.request_id] for ask in asks]
        else:
            num_free, num_running = self.free.num_free_blocks, len(self._scheduler.running)
            if self.tiers is not None:
                # Loads hold only what they load; the rest of their prompts is promised room.
                num_free -= self._scheduler._inflight_prefill_reserved_blocks()
                # A streaming session whose client thinks holds blocks too, but moves nothing.
                num_running += len(self._scheduler.kv_holding_waiting) - self._scheduler.num_waiting_for_streaming_input
            kept = 0 if _fit(asks, self.free.num_unclaimed) else self.idle.kept_blocks
            plan = self.admission.plan(asks, kept, num_free, num_running, now, self._asks.skipped)
            admitted = [request_of[ask.turn.request_id] for ask in plan.admitted]
        self._num_ranked = len(requests)
        self.num_held = len(requests) - len(admitted)
        self._planned, self._fetching = (requests, admitted), fetching
        self.waiting.admit(passing + admitted)
        # Else data parallel takes a hold for a lack of capacity.
        deferred = self._scheduler.deferred_waiting
        deferred.update(requests)
        deferred.difference_update(admitted)


def _fit(asks: "Iterable[Asking]", num_blocks: int) -> bool:
    """Do all of them find room there?"""
    for ask in asks:
        num_blocks -= ask.new_blocks + ask.own_idle_blocks
        if num_blocks < 0:
            return False
    return True

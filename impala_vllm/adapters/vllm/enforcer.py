"""Carries the policy of core into vLLM's queues: once a step, in front of `schedule()`.

Translates waiting requests and idle KV into core's facts, asks rank and admission, hands the plan to the
waiting queue, and answers the free queue's question whose KV goes first. Runs on the engine loop's thread.
"""

from collections import deque
from typing import TYPE_CHECKING

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.request import RequestStatus

from impala_vllm.adapters.vllm import facts
from impala_vllm.adapters.vllm.asks import Asks, Seen
from impala_vllm.adapters.vllm.free_queue import FreeQueue
from impala_vllm.adapters.vllm.waiting_queue import WaitingQueue
from impala_vllm.core.admission import Admission
from impala_vllm.core.cost import StepCost
from impala_vllm.core.gaps import GapForecast
from impala_vllm.core.idle import IdleKv
from impala_vllm.core.lengths import OutputLengths
from impala_vllm.core.retention import Retention
from impala_vllm.core.signature import Signatures
from impala_vllm.core.types import TraceId

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from impala_vllm.config import Config

REFRESH_S, REFRESH_S_PER_TRACE = 1.0, 2e-3
"""How often the gap forecast learns anew from what is still silent: less often where that is much."""

MAX_FINISHING = 8
"""More turns than this are never all about to end: not asked."""

STALLED_S = 10.0
"""Nothing runs, somebody waits and nothing was scheduled for this long: the plan is at fault, or might be."""

ROUND_S_PER_CHAIN = 1e-4
"""An order of eviction is good for so long: asking anew costs time for each chain."""


class Stalled(RuntimeError):
    """Turns wait, nothing runs, and no step schedules anything."""


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
        self.idle = IdleKv(self.gaps, self.admission, Retention(self.cost, config.retention))
        self.num_held = 0
        self.longest_wait_s = 0.0
        self._seen: dict[str, Seen] = {}
        self._known: set[TraceId] = set()
        self._waiting_of: dict[TraceId, int] = {}
        self._tokens_of: dict[TraceId, int] = {}
        self._refreshed_s = 0.0
        self._round_s = 0.0
        self._still_since_s: float | None = None
        self._num_ranked = 0
        self._stepped_s = 0.0
        self._steps: deque[tuple[int, float, int, float]] = deque(maxlen=64)
        self._asks = Asks(scheduler, self._seen, self.cost, self.lengths, config.rank)
        self.waiting = WaitingQueue(scheduler.waiting)
        scheduler.waiting = self.waiting
        self.free: FreeQueue | None = None
        if len(scheduler.kv_cache_config.kv_cache_groups) == 1 and scheduler.cache_config.enable_prefix_caching:
            pool = scheduler.kv_cache_manager.block_pool
            self.free = FreeQueue(pool.free_block_queue, self.idle.cheapest_first)
            pool.free_block_queue = self.free  # type: ignore[assignment]

    def arrive(self, request: "Request", trace_id: TraceId | None, now: float) -> None:
        """`request` is about to be queued."""
        self._seen[request.request_id] = Seen(trace_id, now)
        if trace_id is not None:
            self._known.add(trace_id)
            self.gaps.resume(trace_id, now)
            self._waiting_of[trace_id] = self._waiting_of.get(trace_id, 0) + 1
            if self.free is not None:
                self.free.changed[trace_id] = None

    def finish(self, request: "Request", now: float) -> None:
        """`request` has ended and its blocks are free."""
        seen = self._seen.pop(request.request_id, None)
        if seen is None:
            return
        # The table may have forgotten the trace while its turn was open.
        known = seen.trace_id in self._known
        self.lengths.observe(seen.trace_id if known else None, request.num_output_tokens)
        if seen.trace_id is not None and known:
            left = self._waiting_of.pop(seen.trace_id, 1) - 1
            if left:
                self._waiting_of[seen.trace_id] = left
            else:
                self.gaps.finish(seen.trace_id, now, self._signature(request))
            self._tokens_of[seen.trace_id] = request.num_tokens
            if self.free is not None:
                self.free.changed[seen.trace_id] = None

    def forget(self, trace_id: TraceId) -> None:
        """The trace left the table."""
        self._known.discard(trace_id)
        self._waiting_of.pop(trace_id, None)
        self.gaps.forget(trace_id)
        self.lengths.forget(trace_id)
        self._tokens_of.pop(trace_id, None)
        if self.free is not None:
            self.free.release(trace_id)

    def claim(self, request: "Request", stem_blocks: int) -> None:
        """The blocks freed until `unclaim` are the request's; its first `stem_blocks` are shared with others."""
        seen = self._seen.get(request.request_id)
        if self.free is None or seen is None:
            return
        self.free.claim = seen.trace_id
        if stem_blocks and seen.trace_id is not None:
            blocks = self._scheduler.kv_cache_manager.get_block_ids(request.request_id)[0]
            self.free.stem_blocks = frozenset(blocks[:stem_blocks])

    def unclaim(self) -> None:
        if self.free is not None:
            self.free.claim, self.free.stem_blocks = None, frozenset()

    def reset(self) -> None:
        """The prefix cache is empty: nothing idle is anybody's."""
        if self.free is not None:
            self.free.release_all()

    def retire(self) -> None:
        """Give vLLM its own queues' behaviour back: its scheduling policy, least recently used goes first."""
        waiting = create_request_queue(self._scheduler.policy)
        requests = list(self.waiting)
        for request in [r for r in requests if r.status != RequestStatus.PREEMPTED]:
            waiting.add_request(request)
        waiting.prepend_requests(r for r in requests if r.status == RequestStatus.PREEMPTED)
        self._scheduler.waiting = waiting
        self.unclaim()
        self.reset()

    def plan(self, now: float) -> None:
        """Decide this step: order what runs, order and admit what waits."""
        if now - self._refreshed_s >= REFRESH_S + REFRESH_S_PER_TRACE * len(self._known):
            self.gaps.refresh(now)
            self._refreshed_s = now
        if self.free is not None:
            self._judge_idle(self.free, now)
        running = self._scheduler.running
        if len(running) > 1 and any(r.is_prefill_chunk for r in running):
            running.sort(key=lambda r: r.num_tokens - r.num_computed_tokens if r.is_prefill_chunk else 0)
        if not len(self.waiting):
            self.num_held = self._num_ranked = 0
            self.waiting.admit(())
            return
        self._admit(now)

    def scheduled(self, output: "SchedulerOutput", now: float) -> None:
        """A step was built: note what it will compute, to learn from when it is done. Raises Stalled."""
        for new in output.scheduled_new_reqs:
            seen = self._seen.get(new.req_id)
            if seen is not None:
                self.longest_wait_s = max(self.longest_wait_s, now - seen.arrived_s)
        self._watch(output, now)
        tokens = output.num_scheduled_tokens
        prefill = context = 0
        cached = output.scheduled_cached_reqs
        for request_id, done in zip(
            [r.req_id for r in output.scheduled_new_reqs] + list(cached.req_ids),
            [r.num_computed_tokens for r in output.scheduled_new_reqs] + list(cached.num_computed_tokens),
            strict=True,
        ):
            count = tokens.get(request_id, 0)
            if count > 1:
                prefill += count
                context += count * (done + count // 2)
        if tokens:
            self._steps.append((id(output), now, prefill, context / prefill if prefill else 0.0))

    def stepped(self, output: "SchedulerOutput", now: float) -> None:
        """A step is done. Steps overlap under async scheduling: it took from the end of the one before."""
        while self._steps:
            number, started_s, prefill, context = self._steps.popleft()
            if number == id(output):
                self.cost.observe(now - max(started_s, self._stepped_s), prefill, context)
                break
        self._stepped_s = now

    def _watch(self, output: "SchedulerOutput", now: float) -> None:
        scheduler = self._scheduler
        moves = output.num_scheduled_tokens or scheduler.running or scheduler.pause_state != PauseState.UNPAUSED
        if moves or not self._num_ranked:
            self._still_since_s = None
        elif self._still_since_s is None:
            self._still_since_s = now
        elif now - self._still_since_s >= STALLED_S:
            raise Stalled(f"{self._num_ranked} turns wait and nothing was scheduled for {STALLED_S:.0f} s")

    def _signature(self, request: "Request") -> str:
        """What the turn ended with: a tool, where the engine can see it, else the reason vLLM gives."""
        call = facts.called(request, self._tool_call_tokens)
        if call:
            return self._signatures.of(call) or "tool"
        return str(request.get_finished_reason())

    def _judge_idle(self, free: FreeQueue, now: float) -> None:
        for trace_id in free.changed:
            is_waiting = trace_id in self._waiting_of
            if is_waiting:
                free.spare(trace_id)
            self.idle.update(trace_id, free.num_claimed(trace_id), self._tokens_of.get(trace_id, 0), is_waiting, now)
        free.changed.clear()
        if len(self.waiting):
            self.idle.refresh(now)
        if now - self._round_s >= ROUND_S_PER_CHAIN * len(self.idle):
            free.new_round()
            self._round_s = now

    def _admit(self, now: float) -> None:
        passing, requests, asks = self._asks.ranked(self.waiting, now)
        if self.free is None:
            admitted = requests
        else:
            room = sum(a.new_blocks + a.own_idle_blocks for a in asks)
            kept = 0 if room <= self.free.num_unclaimed else self.idle.kept_blocks  # else all fit beside everything
            running = self._scheduler.running
            plan = self.admission.plan(
                asks, kept, self.free.num_free_blocks, len(running), now, self._finishing_s(running)
            )
            by_id = {request.request_id: request for request in requests}
            admitted = [by_id[a.turn.request_id] for a in plan.admitted]
        self._num_ranked = len(requests)
        self.num_held = len(requests) - len(admitted)
        self.waiting.admit(passing + admitted)
        # Else data parallel takes a hold for a lack of capacity.
        deferred = self._scheduler.deferred_waiting
        deferred.update(requests)
        deferred.difference_update(admitted)

    def _finishing_s(self, running: "list[Request]") -> float | None:
        """Expected seconds until all that runs has ended. None: it prefills, is many, or ran longer than expected."""
        if not 0 < len(running) <= MAX_FINISHING or any(r.is_prefill_chunk for r in running):
            return None
        left = [self._tokens_left(r) for r in running]
        return self.cost.decode_s * max(left) if min(left) > 0 else None

    def _tokens_left(self, request: "Request") -> float:
        seen = self._seen.get(request.request_id)
        expected = self.lengths.expect(seen.trace_id if seen is not None else None, request.max_tokens)
        return expected - request.num_output_tokens

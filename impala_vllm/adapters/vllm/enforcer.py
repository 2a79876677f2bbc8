"""Carries the policy of core into vLLM's queues: once a step, in front of `schedule()`.

Translates waiting requests and idle KV into core's facts, asks rank and admission, hands the plan to the
waiting queue, and answers the free queue's question whose KV goes first. Runs on the engine loop's thread.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.request import RequestStatus

from impala_vllm.adapters.vllm.free_queue import FreeQueue
from impala_vllm.adapters.vllm.waiting_queue import WaitingQueue
from impala_vllm.core import rank
from impala_vllm.core.admission import Admission, Asking, Idle
from impala_vllm.core.cost import StepCost
from impala_vllm.core.gaps import GapForecast
from impala_vllm.core.lengths import OutputLengths
from impala_vllm.core.rank import Waiting
from impala_vllm.core.retention import Holding, Retention
from impala_vllm.core.types import RequestId, TraceId

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from impala_vllm.config import Config

REFRESH_S = 1.0
"""How often the gap forecast learns anew from what is still silent."""

MAX_FINISHING = 8
"""More turns than this are never all about to end: not asked."""


@dataclass(slots=True)
class Seen:
    """What the enforcer remembers of an unfinished request."""

    trace_id: TraceId | None
    arrived_s: float
    reach_blocks: int = 0


class Enforcer:
    """Policy objects, and the two queues they steer."""

    def __init__(self, scheduler: "Scheduler", config: "Config") -> None:
        self._scheduler = scheduler
        self._rank_config = config.rank
        self.gaps = GapForecast(config.gaps)
        self.cost = StepCost(config.cost)
        self.lengths = OutputLengths()
        self.admission = Admission(self.gaps, self.cost, config.rank.hold_s, config.admission)
        self.retention = Retention(self.gaps, self.cost, config.retention)
        self.num_held = 0
        self.longest_wait_s = 0.0
        self._seen: dict[str, Seen] = {}
        self._known: set[TraceId] = set()
        self._waiting_of: dict[TraceId, int] = {}
        self._tokens_of: dict[TraceId, int] = {}
        self._now = 0.0
        self._refreshed_s = 0.0
        self._stepped_s = 0.0
        self._steps: deque[tuple[int, float, int, float]] = deque(maxlen=64)
        self._pool = scheduler.kv_cache_manager.block_pool
        self._block_size = scheduler.block_size
        self.waiting = WaitingQueue(scheduler.waiting)
        scheduler.waiting = self.waiting
        self.free: FreeQueue | None = None
        if len(scheduler.kv_cache_config.kv_cache_groups) == 1 and scheduler.cache_config.enable_prefix_caching:
            self.free = FreeQueue(self._pool.free_block_queue, self._victims)
            self._pool.free_block_queue = self.free  # type: ignore[assignment]

    def arrive(self, request: "Request", trace_id: TraceId | None, now: float) -> None:
        """`request` is about to be queued."""
        self._seen[request.request_id] = Seen(trace_id, now)
        if trace_id is not None:
            self._known.add(trace_id)
            self.gaps.resume(trace_id, now)
            self._waiting_of[trace_id] = self._waiting_of.get(trace_id, 0) + 1

    def finish(self, request: "Request", now: float, signature: str | None) -> None:
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
                self.gaps.finish(seen.trace_id, now, signature)
            self._tokens_of[seen.trace_id] = request.num_tokens

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
        self._now = now
        if now - self._refreshed_s >= REFRESH_S:
            self.gaps.refresh(now)
            self._refreshed_s = now
        if self.free is not None:
            self.free.new_round()
        running = self._scheduler.running
        if len(running) > 1 and any(r.is_prefill_chunk for r in running):
            running.sort(key=lambda r: r.num_tokens - r.num_computed_tokens if r.is_prefill_chunk else 0)
        if not len(self.waiting):
            self.num_held = 0
            self.waiting.admit(())
            return
        self._admit(now)

    def scheduled(self, output: "SchedulerOutput", now: float) -> None:
        """A step was built: note what it will compute, to learn from when it is done."""
        for new in output.scheduled_new_reqs:
            seen = self._seen.get(new.req_id)
            if seen is not None:
                self.longest_wait_s = max(self.longest_wait_s, now - seen.arrived_s)
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

    def _admit(self, now: float) -> None:
        stuck = self.waiting.left_over()
        passing: list[Request] = []
        asking: list[tuple[tuple[int, int, float, float], Request, Asking]] = []
        for request in self.waiting:
            if request.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED) or request.num_computed_tokens:
                passing.append(request)  # waits for something else, or holds blocks: vLLM sees to it
                continue
            ask = self._ask(request, now)
            key = rank.key(ask.turn, self.cost, self._rank_config, now)
            # A head that found no room a step ago lets the others by, once; preempted ones never do.
            asking.append(((key[0] + (3 if request is stuck and key[0] == 2 else 0), *key[1:]), request, ask))
        asking.sort(key=lambda a: a[0])
        requests = {a.turn.request_id: request for _, request, a in asking}
        asks = [a for _, _, a in asking]
        if self.free is None:
            admitted = asks
        else:
            running = self._scheduler.running
            admitted = self.admission.plan(
                asks, self._idle(asks), self.free.num_free_blocks, len(running), now, self._finishing_s(running)
            ).admitted
        self.num_held = len(asks) - len(admitted)
        self.waiting.admit(passing + [requests[a.turn.request_id] for a in admitted])
        held = set(requests.values()).difference(requests[a.turn.request_id] for a in admitted)
        # Else data parallel takes a hold for a lack of capacity.
        deferred = self._scheduler.deferred_waiting
        deferred.difference_update(requests.values())
        deferred |= held

    def _ask(self, request: "Request", now: float) -> Asking:
        seen = self._seen.get(request.request_id) or Seen(None, now)
        reach = self._reach(request, seen)
        expected = self.lengths.expect(seen.trace_id, request.max_tokens)
        if request.status != RequestStatus.PREEMPTED:
            self.longest_wait_s = max(self.longest_wait_s, now - seen.arrived_s)
        needed = -int(-(request.num_tokens + expected - request.num_output_tokens) // self._block_size)
        turn = Waiting(
            RequestId(request.request_id),
            seen.trace_id,
            seen.arrived_s,
            request.num_tokens,
            reach * self._block_size,
            expected,
            request.priority,
            request.status == RequestStatus.PREEMPTED,
        )
        return Asking(turn, max(0, needed - reach), reach - self._referenced(request, reach))

    def _finishing_s(self, running: "list[Request]") -> float | None:
        """Expected seconds until all that runs has ended; None if some of it prefills, or it is many."""
        if not 0 < len(running) <= MAX_FINISHING or any(r.is_prefill_chunk for r in running):
            return None
        return self.cost.decode_s * max(
            self.lengths.expect(seen.trace_id if (seen := self._seen.get(r.request_id)) else None, r.max_tokens)
            - r.num_output_tokens
            for r in running
        )

    def _idle(self, asks: list[Asking]) -> Iterable[Idle]:
        assert self.free is not None
        if sum(a.new_blocks + a.own_idle_blocks for a in asks) <= self.free.num_unclaimed:
            return ()  # everybody fits beside everything
        return [
            Idle(trace_id, num_blocks, self._tokens_of.get(trace_id, 0))
            for trace_id, num_blocks in self.free.claims().items()
            if num_blocks and trace_id not in self._waiting_of
        ]

    def _victims(self, traces: Iterable[TraceId]) -> list[TraceId]:
        now = self._now
        return sorted(
            traces,
            key=lambda t: self.retention.value(Holding(t, self._tokens_of.get(t, 0), t in self._waiting_of), now),
        )

    def _reach(self, request: "Request", seen: Seen) -> int:
        """Leading full blocks of the prompt in HBM. Chains lose their tails first: a search, not a walk."""
        limit = (request.num_tokens - 1) // self._block_size
        low, high = 0, min(len(request.block_hashes), limit)
        guess = min(seen.reach_blocks, high)
        if (guess == 0 or self._cached(request, guess - 1)) and (guess == high or not self._cached(request, guess)):
            return guess
        while low < high:
            middle = (low + high) // 2
            if self._cached(request, middle):
                low = middle + 1
            else:
                high = middle
        seen.reach_blocks = low
        return low

    def _referenced(self, request: "Request", reach: int) -> int:
        """How many of the leading `reach` blocks a running request holds: a prefix of them."""
        low, high = 0, reach
        while low < high:
            middle = (low + high) // 2
            block = self._block(request, middle)
            if block is not None and block.ref_cnt:
                low = middle + 1
            else:
                high = middle
        return low

    def _cached(self, request: "Request", index: int) -> bool:
        return self._block(request, index) is not None

    def _block(self, request: "Request", index: int) -> KVCacheBlock | None:
        key = make_block_hash_with_group_id(request.block_hashes[index], 0)
        return self._pool.cached_block_hash_to_block.get_one_block(key)

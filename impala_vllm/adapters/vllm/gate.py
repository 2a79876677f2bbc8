"""Which waiting turns `schedule()` is shown in a step, and in which order: rank, loads and admission, in that order."""

from typing import TYPE_CHECKING

from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.request import RequestStatus

from impala_vllm.adapters.vllm.waiting_queue import WaitingQueue
from impala_vllm.adapters.vllm.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from impala_vllm.adapters.vllm.asks import Asks
    from impala_vllm.adapters.vllm.free_queue import FreeQueue
    from impala_vllm.adapters.vllm.tiers.policy import TierPolicy
    from impala_vllm.core.admission import Admission, Asking
    from impala_vllm.core.idle import IdleKv

_NOBODY: frozenset[str] = frozenset()


class Gate:
    """In front of a scheduler's waiting queue, which it replaces until `retire`."""

    def __init__(
        self,
        scheduler: "Scheduler",
        asks: "Asks",
        admission: "Admission",
        idle: "IdleKv",
        free: "FreeQueue | None",
        tiers: "TierPolicy | None",
    ) -> None:
        """`free` None: nobody can tell what idle KV is worth, and nobody is held."""
        self._scheduler = scheduler
        self._asks = asks
        self._admission = admission
        self._idle = idle
        self._free = free
        self._tiers = tiers
        self._watchdog = Watchdog(scheduler, tiers)
        self.waiting = WaitingQueue(scheduler.waiting)
        scheduler.waiting = self.waiting
        self.num_held = 0
        self._waited: Sequence[Request] = ()
        self._admitted: list[Request] = []
        """Who of them was let through."""
        self._fetching = _NOBODY
        self._num_free = 0

    def plan(self, now: float) -> None:
        """Decide who is shown to the coming step."""
        if not len(self.waiting):
            self._show((), [], [], _NOBODY)
            return
        passing, requests, asks = self._asks.ranked(self.waiting, now)
        fetching = _NOBODY
        if self._tiers is not None:
            ready = self._tiers.load(asks, now)
            if len(ready) < len(asks):
                fetching = frozenset(a.turn.request_id for a in asks).difference(a.turn.request_id for a in ready)
            asks = ready
        if self._watchdog.lets_all_through:
            others = set(passing)
            everybody = [request for request in self.waiting if request not in others]
            self._show(everybody, everybody, passing, _NOBODY)
            return
        if self._free is not None and self._asks.knows_reach:
            asks = self._fitting(asks, self._free, now)
        request_of = self._scheduler.requests
        self._show(requests, [request_of[ask.turn.request_id] for ask in asks], passing, fetching)

    def stepped(self, output: "SchedulerOutput", now: float, is_throttled: bool = False) -> None:
        """The step was built; a throttled one was to place no prefill. Raises Stalled."""
        if output.total_num_scheduled_tokens:
            self._asks.skipped.clear()
        num_free = self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        has_placed = output.scheduled_new_reqs or output.scheduled_cached_reqs.resumed_req_ids
        self.waiting.stepped(bool(has_placed) or num_free > self._num_free, is_throttled)
        self._num_free = num_free
        self._watchdog.watch(output, len(self._waited), now)

    def kept_back(self) -> tuple[frozenset[str], frozenset[str]]:
        """Requests held by admission in this step's plan, and those not in it because their KV is read from NVMe.

        O(waiting): for the ledger, which asks once a step.
        """
        if self.num_held <= len(self._fetching):
            return _NOBODY, self._fetching
        waited, admitted = (r.request_id for r in self._waited), (r.request_id for r in self._admitted)
        return frozenset(waited).difference(self._fetching, admitted), self._fetching

    def retire(self) -> None:
        """Give vLLM a queue of its own back, by its scheduling policy."""
        waiting = create_request_queue(self._scheduler.policy)
        requests = list(self.waiting)
        for request in [r for r in requests if r.status != RequestStatus.PREEMPTED]:
            waiting.add_request(request)
        waiting.prepend_requests(r for r in requests if r.status == RequestStatus.PREEMPTED)
        self._scheduler.waiting = waiting
        self._scheduler.deferred_waiting.difference_update(self._waited)

    def _fitting(self, asks: "list[Asking]", free: "FreeQueue", now: float) -> "list[Asking]":
        num_free, num_running = free.num_free_blocks, len(self._scheduler.running)
        if self._tiers is not None:
            # Loads hold only what they load; the rest of their prompts is promised room.
            num_free -= self._scheduler._inflight_prefill_reserved_blocks()
            # A streaming session whose client thinks holds blocks too, but moves nothing.
            num_running += len(self._scheduler.kv_holding_waiting) - self._scheduler.num_waiting_for_streaming_input
        kept = 0 if _fit(asks, free.num_unclaimed) else self._idle.kept_blocks
        return self._admission.plan(asks, kept, num_free, num_running, now, self._asks.skipped).admitted

    def _show(
        self,
        waited: "Sequence[Request]",
        admitted: "list[Request]",
        passing: "list[Request]",
        fetching: frozenset[str],
    ) -> None:
        self._waited, self._admitted, self._fetching = waited, admitted, fetching
        self.num_held = len(waited) - len(admitted)
        self.waiting.admit(passing + admitted)
        # Else data parallel takes a hold for a lack of capacity.
        deferred = self._scheduler.deferred_waiting
        deferred.update(waited)
        deferred.difference_update(admitted)


def _fit(asks: "Iterable[Asking]", num_blocks: int) -> bool:
    """Do all of them find room there?"""
    for ask in asks:
        num_blocks -= ask.new_blocks + ask.own_idle_blocks
        if num_blocks < 0:
            return False
    return True

"""Waiting requests as core's asks, in order of rank.

What a turn asks for changes slowly, so in a long queue only some are judged again each step: those that are
new, those that stand first, and the others in rotation.
"""

from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.request import RequestStatus

from impala_vllm.core import rank
from impala_vllm.core.admission import Asking
from impala_vllm.core.rank import Waiting
from impala_vllm.core.types import RequestId, TraceId

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from impala_vllm.adapters.vllm.waiting_queue import WaitingQueue
    from impala_vllm.core.cost import StepCost
    from impala_vllm.core.lengths import OutputLengths
    from impala_vllm.core.rank import Key, RankConfig

MAX_JUDGED = 16
"""Turns judged again in a step: some 150 us. A queue no longer than this is judged anew each time."""


class Seen:
    """What policy remembers of an unfinished request."""

    __slots__ = ("arrived_s", "ask", "key", "reach_blocks", "trace_id")

    def __init__(self, trace_id: TraceId | None, arrived_s: float) -> None:
        self.trace_id = trace_id
        self.arrived_s = arrived_s
        self.reach_blocks = 0
        self.ask: Asking | None = None
        """As last judged; None before."""
        self.key: Key | None = None


class Ranked(NamedTuple):
    """The queue, cut in two."""

    passing: "list[Request]"
    """Waits for something else than a place, or holds blocks: vLLM sees to it."""
    requests: "list[Request]"
    """In order of rank."""
    asks: list[Asking]
    """What each of `requests` asks for."""


class Asks:
    """Judges and ranks. `seen` is the enforcer's, by request id."""

    def __init__(
        self,
        scheduler: "Scheduler",
        seen: dict[str, Seen],
        cost: "StepCost",
        lengths: "OutputLengths",
        config: "RankConfig",
    ) -> None:
        self._blocks = scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block
        self._block_size = scheduler.block_size
        self._seen = seen
        self._cost = cost
        self._lengths = lengths
        self._config = config
        self._order: list[str] = []
        self._turn = 0

    def ranked(self, waiting: "WaitingQueue", now: float) -> Ranked:
        """Everybody who waits, best first. O(n log n), with a bounded number of judgements but for newcomers."""
        due = self._due(len(waiting))
        stuck = waiting.left_over()
        passing: list[Request] = []
        entries: list[tuple[Key, Request, Asking]] = []
        for request in waiting:
            is_preempted = request.status == RequestStatus.PREEMPTED
            if not (is_preempted or request.status == RequestStatus.WAITING) or request.num_computed_tokens:
                passing.append(request)
                continue
            request_id = request.request_id
            seen = self._seen.get(request_id) or self._seen.setdefault(request_id, Seen(None, now))
            ask, key = seen.ask, seen.key
            is_late = now - seen.arrived_s >= self._config.hold_s
            if (
                ask is None
                or key is None
                or due is None
                or request_id in due
                or ask.turn.preempted != is_preempted
                or (is_late and key[0] == rank.IN_TIME)
            ):
                ask = seen.ask = self._ask(request, seen, is_preempted)
                key = seen.key = rank.key(ask.turn, self._cost, self._config, now)
            # A head that found no room a step ago lets the others by, once; preempted ones never do.
            if request is stuck and key[0] == rank.IN_TIME:
                key = (rank.PASSED_BY, *key[1:])
            entries.append((key, request, ask))
        entries.sort(key=itemgetter(0))
        requests = [request for _, request, _ in entries]
        self._order = [request.request_id for request in requests]
        return Ranked(passing, requests, [ask for _, _, ask in entries])

    def _due(self, num_waiting: int) -> set[str] | None:
        """Who is judged again; None: everybody."""
        if num_waiting <= MAX_JUDGED:
            return None
        half = MAX_JUDGED // 2
        self._turn = self._turn + half if self._turn + half < len(self._order) else 0
        return {*self._order[:half], *self._order[self._turn : self._turn + half]}

    def _ask(self, request: "Request", seen: Seen, is_preempted: bool) -> Asking:
        reach = self._reach(request, seen)
        expected = self._lengths.expect(seen.trace_id, request.max_tokens)
        needed = -int(-(request.num_tokens + expected - request.num_output_tokens) // self._block_size)
        turn = Waiting(
            RequestId(request.request_id),
            seen.trace_id,
            seen.arrived_s,
            request.num_tokens,
            reach * self._block_size,
            expected,
            request.priority,
            is_preempted,
        )
        return Asking(turn, max(0, needed - reach), reach - self._referenced(request, reach))

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
        return self._blocks.get_one_block(key)

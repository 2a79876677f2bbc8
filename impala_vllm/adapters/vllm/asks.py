"""Waiting requests as core's asks, in order of rank.

What a turn asks for changes slowly, so in a long queue only some are judged again each step: those that are
new, those that stand first, and the others in rotation.
"""

import math
from bisect import bisect_left
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.kv_cache_interface import is_full_attention_spec
from vllm.v1.request import RequestStatus

from impala_vllm.adapters.vllm.rank_order import RankOrder
from impala_vllm.core import rank
from impala_vllm.core.admission import Asking
from impala_vllm.core.open_turns import OpenTurn
from impala_vllm.core.rank import Waiting
from impala_vllm.core.rotation import Rotation
from impala_vllm.core.types import RequestId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from impala_vllm.adapters.vllm.tiers.policy import TierPolicy
    from impala_vllm.adapters.vllm.waiting_queue import WaitingQueue
    from impala_vllm.core.cost import StepCost
    from impala_vllm.core.lengths import OutputLengths
    from impala_vllm.core.open_turns import OpenTurns
    from impala_vllm.core.rank import Key, RankConfig


class Ranked(NamedTuple):
    """The queue, cut in two."""

    passing: "list[Request]"
    """Nobody's to rank: they wait for something else than a place, or hold blocks."""
    requests: "list[Request]"
    """In order of rank."""
    asks: list[Asking]
    """What each of `requests` asks for."""


class Asks:
    """Judges and ranks. `turns` are the enforcer's."""

    def __init__(
        self,
        scheduler: "Scheduler",
        turns: "OpenTurns[OpenTurn]",
        cost: "StepCost",
        lengths: "OutputLengths",
        config: "RankConfig",
        tiers: "TierPolicy | None" = None,
    ) -> None:
        self._pool = scheduler.kv_cache_manager.block_pool
        self._block_size = scheduler.block_size
        self._group = _searchable_group(scheduler)
        self._turns = turns
        self._cost = cost
        self._lengths = lengths
        # Without it a resume looks like a new prompt, and order by work would put it last.
        self._config = config if self._group is not None else replace(config, enabled=False)
        self._tiers = tiers
        self._goes_by_priority = scheduler.policy == SchedulingPolicy.PRIORITY
        self.skipped = set[RequestId]()
        """Who was passed over for another reason than room; whoever reads it clears it."""
        self._order = RankOrder()
        """As last judged."""
        self._passing: list[Request] = []
        self._rotation = Rotation(cost)
        self._late_s = math.inf
        """Not before then is one of them past its bound, and has to be judged again."""

    @property
    def knows_reach(self) -> bool:
        """Can it tell how much of a prompt is in HBM?"""
        return self._group is not None

    def ranked(self, waiting: "WaitingQueue", now: float) -> Ranked:
        """Everybody who waits, best first.

        Who was judged keeps that place: a bounded number of judgements but for newcomers.
        """
        members, order = waiting.members, self._order
        for request in waiting.take_gone():
            # Whom a step skipped, for a limit on adapters say, is back where it stood.
            if request not in members or request.status == RequestStatus.PREEMPTED:
                order.discard(request)
            else:
                self.skipped.add(RequestId(request.request_id))
        again = dict.fromkeys(self._passing)
        again.update(dict.fromkeys(r for r in waiting.take_added() if r not in order))
        due = self._due(len(waiting), now)
        again.update(dict.fromkeys(due))
        self._passing = []
        for request in again:
            if request not in members:
                continue
            judged = self._judge(request, now)
            if judged is None:
                order.discard(request)
                self._passing.append(request)
            else:
                order.put(request, *judged)
        return Ranked(self._passing, *order.passed_by(waiting.left_over()))

    def _due(self, num_waiting: int, now: float) -> "Sequence[Request]":
        """Who of those ranked is judged again."""
        due = self._rotation.due(self._order.requests, num_waiting)
        if due is None:
            self._late_s = math.inf
            return self._order.requests.copy()
        if self._tiers is None:
            due = [request for request in due if self._has_moved(request)]
        if now >= self._late_s:
            bounds = [(ask.turn.arrived_s + self._config.hold_s, r) for r, ask in self._order.in_time()]
            self._late_s = min((bound_s for bound_s, _ in bounds if bound_s > now), default=math.inf)
            return [*due, *(request for bound_s, request in bounds if bound_s <= now)]
        return due

    def _has_moved(self, request: "Request") -> bool:
        """Is another part of its prompt in HBM, or held by others, than when it was judged?"""
        ask, turn = self._order.ask(request), self._turns.get(RequestId(request.request_id))
        if turn is None:
            return True
        reach = self._reach(request, turn)
        if reach * self._block_size != ask.turn.reach_tokens:
            return True
        return reach - self._referenced(request, reach) != ask.own_idle_blocks

    def _judge(self, request: "Request", now: float) -> "tuple[Key, Asking] | None":
        """None where the request waits for something else, or holds blocks: vLLM sees to it."""
        is_preempted = request.status == RequestStatus.PREEMPTED
        is_waiting = is_preempted or request.status == RequestStatus.WAITING or _has_grammar(request)
        if not is_waiting or request.num_computed_tokens:
            return None
        name = RequestId(request.request_id)
        turn = self._turns.get(name)
        if turn is None:
            turn = OpenTurn(None, now)
            self._turns.arrive(name, turn, request.num_tokens, now)
        ask = self._ask(request, turn, is_preempted)
        bound_s = turn.arrived_s + self._config.hold_s
        if now < bound_s:
            self._late_s = min(self._late_s, bound_s)
        return rank.key(ask.turn, self._cost, self._config, now), ask

    def _ask(self, request: "Request", seen: OpenTurn, is_preempted: bool) -> Asking:
        reach = self._reach(request, seen)
        expected = self._lengths.expect(seen.trace_id, request.max_tokens)
        needed = -int(-(request.num_tokens + expected - request.num_output_tokens) // self._block_size)
        reach_tokens, load_s = reach * self._block_size, 0.0
        if self._tiers is not None:
            reach_tokens, load_s = self._tiers.reach(request, reach)
        turn = Waiting(
            RequestId(request.request_id),
            seen.trace_id,
            seen.arrived_s,
            request.num_tokens,
            reach_tokens,
            expected,
            request.priority if self._goes_by_priority else 0,
            is_preempted,
            load_s,
        )
        return Asking(turn, max(0, needed - reach), reach - self._referenced(request, reach))

    def _reach(self, request: "Request", seen: OpenTurn) -> int:
        """Leading full blocks of the prompt in HBM. Chains lose their tails first: a search, not a walk."""
        if self._group is None or request.skip_reading_prefix_cache:
            return 0
        high = min(len(request.block_hashes), (request.num_tokens - 1) // self._block_size)
        guess = min(seen.reach_blocks, high)
        if (guess == 0 or self._cached(request, guess - 1)) and (guess == high or not self._cached(request, guess)):
            return guess
        seen.reach_blocks = bisect_left(range(high), True, key=lambda i: not self._cached(request, i))
        return seen.reach_blocks

    def _referenced(self, request: "Request", reach: int) -> int:
        """How many of the leading `reach` blocks a running request holds: a prefix of them."""

        def is_free(index: int) -> bool:
            block = self._block(request, index)
            return block is None or not block.ref_cnt

        return bisect_left(range(reach), True, key=is_free)

    def _cached(self, request: "Request", index: int) -> bool:
        return self._block(request, index) is not None

    def _block(self, request: "Request", index: int) -> KVCacheBlock | None:
        key = make_block_hash_with_group_id(request.block_hashes[index], self._group or 0)
        # Asked of the pool each time: a reset gives it a new map.
        return self._pool.cached_block_hash_to_block.get_one_block(key)


def _searchable_group(scheduler: "Scheduler") -> int | None:
    """The KV cache group whose blocks tell how far a prompt is cached: it keeps whole chains, a hash for each block.

    None where there is no such group: windows and states keep ends of chains.
    """
    groups = scheduler.kv_cache_config.kv_cache_groups
    if scheduler.hash_block_size != scheduler.block_size:
        return None
    for number, group in enumerate(groups):
        is_whole = is_full_attention_spec(group.kv_cache_spec)
        if is_whole and (len(groups) == 1 or group.kv_cache_spec.block_size == scheduler.block_size):
            return number
    return None


def _has_grammar(request: "Request") -> bool:
    """Did it wait for a grammar that is compiled now? vLLM notes that when it looks at the request."""
    if request.status != RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
        return False
    asked = request.structured_output_request
    return asked is not None and asked.grammar is not None and not isinstance(asked.grammar, Exception)

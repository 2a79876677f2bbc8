"""A replica's waiting requests as core's asks, in order of rank: what `adapters/vllm/asks.py` does for vLLM's queue.

The same bounds on how many are judged again each step, because they too decide who goes first.
"""

import math
from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from impala_vllm.core import rank
from impala_vllm.core.admission import Asking
from impala_vllm.core.cost import StepCost
from impala_vllm.core.lengths import OutputLengths
from impala_vllm.core.rank import Key, RankConfig, Waiting
from impala_vllm.core.types import RequestId, TraceId
from impala_vllm.sim.request import Request

if TYPE_CHECKING:
    from impala_vllm.sim.policies.impala_tiers import Reach
    from impala_vllm.sim.replica import Replica

Entry: TypeAlias = tuple[Key, Request, Asking]

MAX_JUDGED = 4
"""Turns judged again in a step."""
PRICED_TOKENS, PRICE_TOLERANCE = 2048, 0.1
"""When a prefill of so many tokens costs so much more or less than it did, old judgements compare no more."""


class Seen:
    """What policy remembers of an unfinished request."""

    __slots__ = ("arrived_s", "entry", "has_begun", "late_s", "reach_blocks", "stem", "trace_id", "was_preempted")

    def __init__(self, trace_id: TraceId, arrived_s: float) -> None:
        self.trace_id = trace_id
        self.arrived_s = arrived_s
        self.reach_blocks = self.stem = 0
        self.has_begun = False
        self.entry: Entry | None = None
        self.was_preempted = False
        self.late_s = 0.0


class Ranked(NamedTuple):
    """In order of rank; `asks[i]` is what `requests[i]` asks for."""

    requests: list[Request]
    asks: list[Asking]


class Asks:
    """Judges and ranks. `seen` is the policy's, by request."""

    def __init__(
        self,
        replica: "Replica",
        seen: dict[Request, Seen],
        cost: StepCost,
        lengths: OutputLengths,
        config: RankConfig,
        reach: "Callable[[Request, int], Reach] | None",
    ) -> None:
        """`reach`: how far a turn gets with what lies below HBM; None: nothing does."""
        self._replica = replica
        self._size = replica.shape.block_size
        self._seen = seen
        self._cost = cost
        self._lengths = lengths
        self._config = config
        self._rank_reach = reach
        self._order: list[Request] = []
        self._turn = 0
        self._price_s = 0.0

    def ranked(self, now: float) -> Ranked:
        """Everybody who waits, best first."""
        replica = self._replica
        waiting = [*replica.waiting, *replica.preempted]
        due = self._due(len(waiting))
        entries: list[Entry] = []
        for request in waiting:
            seen = self._seen[request]
            entry = seen.entry
            if (
                entry is None
                or due is None
                or request in due
                or request.is_preempted is not seen.was_preempted
                or now >= seen.late_s
            ):
                entry = self._judge(request, seen, now)
            entries.append(_passed_by(entry) if request is replica.stuck else entry)
        entries.sort(key=itemgetter(0))
        self._order = [request for _, request, _ in entries]
        return Ranked(self._order, [ask for _, _, ask in entries])

    def _due(self, num_waiting: int) -> set[Request] | None:
        """Who is judged again; None: everybody."""
        price_s = self._cost.prefill_s(PRICED_TOKENS) + self._cost.decode_s
        has_changed = abs(price_s - self._price_s) > PRICE_TOLERANCE * self._price_s
        if has_changed:
            self._price_s = price_s
        if has_changed or num_waiting <= MAX_JUDGED:
            return None
        half = MAX_JUDGED // 2
        self._turn = self._turn + half if self._turn + half < len(self._order) else 0
        return {*self._order[:half], *self._order[self._turn : self._turn + half]}

    def _judge(self, request: Request, seen: Seen, now: float) -> Entry:
        seen.was_preempted = request.is_preempted
        ask = self._ask(request, seen)
        bound_s = seen.arrived_s + self._config.hold_s
        seen.late_s = bound_s if now < bound_s else math.inf
        seen.entry = rank.key(ask.turn, self._cost, self._config, now), request, ask
        return seen.entry

    def _ask(self, request: Request, seen: Seen) -> Asking:
        reach = self._reach(request, seen)
        expected = self._lengths.expect(seen.trace_id, request.turn.output_limit)
        needed = -int(-(request.num_tokens + expected - request.num_output) // self._size)
        reach_tokens, load_s = reach * self._size, 0.0
        if self._rank_reach is not None:
            reach_tokens, load_s = self._rank_reach(request, reach)
        turn = Waiting(
            RequestId(request.request_id),
            seen.trace_id,
            seen.arrived_s,
            request.num_tokens,
            reach_tokens,
            expected,
            preempted=request.is_preempted,
            load_s=load_s,
        )
        return Asking(turn, max(0, needed - reach), reach - self._referenced(request, reach))

    def _reach(self, request: Request, seen: Seen) -> int:
        """Leading full blocks of the prompt in HBM. Chains lose their tails first: a search, not a walk."""
        keys, has = request.keys, self._replica.pool.has
        low, high = 0, (request.num_tokens - 1) // self._size
        guess = min(seen.reach_blocks, high)
        if (guess == 0 or has(keys[guess - 1])) and (guess == high or not has(keys[guess])):
            return guess
        while low < high:
            middle = (low + high) // 2
            if has(keys[middle]):
                low = middle + 1
            else:
                high = middle
        seen.reach_blocks = low
        return low

    def _referenced(self, request: Request, reach: int) -> int:
        """How many of the leading `reach` blocks a running request holds: a prefix of them."""
        low, high = 0, reach
        while low < high:
            middle = (low + high) // 2
            if self._replica.pool.is_referenced(request.keys[middle]):
                low = middle + 1
            else:
                high = middle
        return low


def _passed_by(entry: Entry) -> Entry:
    """A head that found no room a step ago lets the others by, once; preempted and late ones never do."""
    key, request, ask = entry
    return ((rank.PASSED_BY, *key[1:]), request, ask) if key[0] == rank.IN_TIME else entry

"""A replica's waiting requests as core's asks, in order of rank: what `adapters/vllm/asks.py` does for vLLM's queue.

The same bounds on how many are judged again each step, because they too decide who goes first.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from impala_vllm.core import rank
from impala_vllm.core.admission import Asking
from impala_vllm.core.cost import StepCost
from impala_vllm.core.lengths import OutputLengths
from impala_vllm.core.open_turns import OpenTurn, OpenTurns
from impala_vllm.core.rank import Key, RankConfig, Waiting
from impala_vllm.core.rotation import Rotation
from impala_vllm.core.types import RequestId, TraceId
from impala_vllm.sim.request import Request

if TYPE_CHECKING:
    from impala_vllm.sim.policies.impala_tiers import Reach
    from impala_vllm.sim.replica import Replica

Entry: TypeAlias = tuple[Key, Request, Asking]


class Judged(OpenTurn):
    """An unfinished request and where it was last ranked."""

    __slots__ = ("entry", "late_s", "was_preempted")

    def __init__(self, trace_id: TraceId, arrived_s: float) -> None:
        super().__init__(trace_id, arrived_s)
        self.entry: Entry | None = None
        self.was_preempted = False
        self.late_s = 0.0


class Ranked(NamedTuple):
    """In order of rank; `asks[i]` is what `requests[i]` asks for."""

    requests: list[Request]
    asks: list[Asking]


class Asks:
    """Judges and ranks. `turns` are the policy's."""

    def __init__(
        self,
        replica: "Replica",
        turns: OpenTurns[Judged],
        cost: StepCost,
        lengths: OutputLengths,
        config: RankConfig,
        reach: "Callable[[Request, int], Reach] | None",
    ) -> None:
        """`reach`: how far a turn gets with what lies below HBM; None: nothing does."""
        self._replica = replica
        self._size = replica.shape.block_size
        self._turns = turns
        self._cost = cost
        self._lengths = lengths
        self._config = config
        self._rank_reach = reach
        self._order: list[Request] = []
        self._rotation = Rotation(cost)

    def ranked(self, now: float) -> Ranked:
        """Everybody who waits, best first."""
        replica = self._replica
        waiting = [*replica.waiting, *replica.preempted]
        due = self._rotation.due(self._order, len(waiting))
        entries: list[Entry] = []
        for request in waiting:
            seen = self._turns[RequestId(request.request_id)]
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

    def _judge(self, request: Request, seen: Judged, now: float) -> Entry:
        seen.was_preempted = request.is_preempted
        ask = self._ask(request, seen)
        bound_s = seen.arrived_s + self._config.hold_s
        seen.late_s = bound_s if now < bound_s else math.inf
        seen.entry = rank.key(ask.turn, self._cost, self._config, now), request, ask
        return seen.entry

    def _ask(self, request: Request, seen: Judged) -> Asking:
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

    def _reach(self, request: Request, seen: Judged) -> int:
        """Leading full blocks of the prompt in HBM. Chains lose their tails first: a search, not a walk."""
        keys, has = request.keys, self._replica.pool.has
        high = (request.num_tokens - 1) // self._size
        guess = min(seen.reach_blocks, high)
        if (guess == 0 or has(keys[guess - 1])) and (guess == high or not has(keys[guess])):
            return guess
        seen.reach_blocks = bisect_left(range(high), True, key=lambda i: not has(keys[i]))
        return seen.reach_blocks

    def _referenced(self, request: Request, reach: int) -> int:
        """How many of the leading `reach` blocks a running request holds: a prefix of them."""
        keys, is_referenced = request.keys, self._replica.pool.is_referenced
        return bisect_left(range(reach), True, key=lambda i: not is_referenced(keys[i]))


def _passed_by(entry: Entry) -> Entry:
    """A head that found no room a step ago lets the others by, once; preempted and late ones never do."""
    key, request, ask = entry
    return ((key[0], rank.PASSED_BY, *key[2:]), request, ask) if key[1] == rank.IN_TIME else entry

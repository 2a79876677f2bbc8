"""A bound: stock's order, and the KV that is used again last goes first (Belady 1966, by session).

Knows how long each tool will take; when the turn after it runs nobody knows, so the resume counts.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from impala_vllm.sim.eviction import ByTrace
from impala_vllm.sim.policies.stems import Stems
from impala_vllm.sim.policy import Policy
from impala_vllm.sim.request import Request

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica


class Belady(Policy):
    """Evicts by the true next resume."""

    def __init__(self, replica: "Replica") -> None:
        super().__init__(replica)
        self.order = self.idle = ByTrace(self._farthest_first)
        self._stems = Stems()
        self._next_s: dict[str, float] = {}

    def arrive(self, request: Request, now: float) -> None:
        self._stems.arrive(request)
        self._next_s[request.session.session_id] = now
        self.order.new_round()

    def finish(self, request: Request, now: float) -> None:
        gap_s = request.turn.next_gap_s
        self._next_s[request.session.session_id] = math.inf if gap_s is None else now + gap_s
        self.order.new_round()

    def owner(self, request: Request) -> tuple[str | None, int]:
        return request.session.session_id, self._stems.depth(request)

    def _farthest_first(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda n: -self._next_s.get(n, math.inf))

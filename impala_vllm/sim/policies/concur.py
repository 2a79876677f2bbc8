"""CONCUR (https://arxiv.org/abs/2601.22705), re-implemented: a congestion window on the number of live agents.

The window grows by `ADD` while HBM in use is below `LOW` and is cut by half where it is above `HIGH` and the hit
ratio is below `LOW_HITS`. An agent outside it is held at its next turn; inside it runs to its end. Engine: stock.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from impala_vllm.sim.policies.programs import Programs
from impala_vllm.sim.policy import Policy
from impala_vllm.sim.request import Request

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica

CHECK_S = 1.0
START, ADD, CUT = 8, 2, 0.5
LOW, HIGH, LOW_HITS = 0.2, 0.5, 0.2


class Concur(Policy):
    """Additive increase, multiplicative decrease."""

    replan_s = CHECK_S

    def __init__(self, replica: "Replica") -> None:
        super().__init__(replica)
        self.programs = Programs()
        self.window = float(START)
        self._checked_s = 0.0
        self._prompt_tokens = self._cached_tokens = 0

    def arrive(self, request: Request, now: float) -> None:
        self.programs.arrive(request, now)

    def placed(self, request: Request, now: float) -> None:
        if not request.is_preempted:
            self._prompt_tokens += request.prompt_tokens
            self._cached_tokens += request.num_computed

    def finish(self, request: Request, now: float) -> None:
        self.programs.finish(request, now)

    def plan(self, now: float) -> Iterable[Request]:
        if now - self._checked_s >= CHECK_S:
            self._checked_s = now
            self._check()
        # First come, first in the window: agents leave it only by ending.
        inside = {p.name for p, _ in zip(self.programs, range(max(1, int(self.window))), strict=False)}
        order = list(super().plan(now))
        self.held = [r for r in order if r.session.session_id not in inside and not r.is_preempted]
        return [r for r in order if r.session.session_id in inside or r.is_preempted]

    def _check(self) -> None:
        pool = self.replica.pool
        usage = 1 - pool.num_free / pool.num_blocks
        hits = self._cached_tokens / self._prompt_tokens if self._prompt_tokens else 1.0
        if usage < LOW:
            self.window = min(self.window + ADD, len(self.programs) + ADD)
        elif usage > HIGH and hits < LOW_HITS:
            self.window = max(1.0, self.window * CUT)
        self._prompt_tokens = self._cached_tokens = 0

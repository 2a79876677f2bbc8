"""A bound: this project's policy with a gap forecast that is always right."""

import math
from typing import TYPE_CHECKING

from impala_vllm.core.gaps import GapForecast
from impala_vllm.core.types import TraceId
from impala_vllm.sim.policies.impala import Impala
from impala_vllm.sim.request import Request

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica


class OracleGaps(GapForecast):
    """Is told when each trace will be back."""

    def __init__(self) -> None:
        super().__init__()
        self._back_s: dict[TraceId, float] = {}
        self._last_s: dict[TraceId, float] = {}

    def tell(self, trace_id: TraceId, now: float, gap_s: float | None) -> None:
        """The trace goes silent for `gap_s`; None: for good."""
        self._back_s[trace_id] = math.inf if gap_s is None else now + gap_s
        self._last_s[trace_id] = math.inf if gap_s is None else gap_s

    def gone(self, trace_id: TraceId) -> None:
        """It came back and was taken for another trace: this one will not."""
        self._back_s[trace_id] = math.inf

    def forget(self, trace_id: TraceId) -> None:
        super().forget(trace_id)
        self._back_s.pop(trace_id, None)
        self._last_s.pop(trace_id, None)

    def quantile_remaining_s(self, trace_id: TraceId, chance: float, now: float) -> float | None:
        if self.silent_s(trace_id, now) is None:
            return None
        # Overdue: it waits for children that are served as slowly as everybody.
        return max(0.0, self._back_s.get(trace_id, math.inf) - now)

    def chance_within(self, trace_id: TraceId, within_s: float, now: float) -> float | None:
        left_s = self.quantile_remaining_s(trace_id, 0.5, now)
        return None if left_s is None else float(left_s <= within_s)

    def usual_s(self, trace_id: TraceId) -> float:
        return self._last_s.get(trace_id, math.inf)


class Oracle(Impala):
    """Impala that knows when its traces come back."""

    def __init__(self, replica: "Replica") -> None:
        self._told = OracleGaps()
        super().__init__(replica, gaps=self._told)
        self._silent: dict[str, TraceId] = {}
        """What each session was taken for when it went silent."""

    def arrive(self, request: Request, now: float) -> None:
        super().arrive(request, now)
        before = self._silent.pop(request.session.session_id, None)
        if before is not None and before != self.trace_of(request):
            self._told.gone(before)

    def finish(self, request: Request, now: float) -> None:
        trace_id = self.trace_of(request)
        super().finish(request, now)
        if trace_id is not None:
            self._told.tell(trace_id, now, request.turn.next_gap_s)
            self._silent[request.session.session_id] = trace_id

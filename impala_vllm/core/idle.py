"""What each trace's idle KV is worth just now: kept or not, and in which order it may go.

Answers change with time, so each row is judged again when that is due, sooner for what is expected soon. A few
rows a step are enough: the cost of a step does not grow with the number of traces.
"""

import heapq
import math
from collections.abc import Iterable

from impala_vllm.core.admission import Admission
from impala_vllm.core.gaps import GapForecast
from impala_vllm.core.planner import NOTHING, Below, Planner
from impala_vllm.core.retention import Holding, Retention
from impala_vllm.core.types import TraceId

MAX_JUDGED = 3
"""Rows judged again in one `refresh`: some 30 us."""
FRESH_S = 0.1
"""A judgement is good for this long, or for a share of the expected wait."""
FRESH_SHARE = 0.05
FRESH_AT_MOST_S = 10.0
CATCH_UP = 50
"""Rows judged in one `refresh` on top of that after a longer pause, until every row was: half a millisecond."""


class IdleKv:
    """The table. Update it when a trace's idle blocks change or its turn comes or goes; O(log traces) each way."""

    def __init__(
        self, gaps: GapForecast, admission: Admission, retention: Retention, planner: Planner | None = None
    ) -> None:
        """`planner` prices what tiers below HBM hold; None: there are none."""
        self.kept_blocks = 0
        """Blocks that admission keeps room for."""
        self._gaps = gaps
        self._admission = admission
        self._retention = retention
        self._planner = planner
        self._rows: dict[TraceId, _Row] = {}
        self._due: list[tuple[float, int, TraceId]] = []
        self._num_judged = 0
        self._refreshed_s = 0.0
        self._num_behind = 0
        """Rows to catch up on."""

    def __len__(self) -> int:
        return len(self._rows)

    def update(
        self,
        trace_id: TraceId,
        num_blocks: int,
        num_tokens: int,
        is_waiting: bool,
        now: float,
        below: Below = NOTHING,
        is_running: bool = False,
    ) -> None:
        """The trace has `num_blocks` of idle KV in HBM, of the `num_tokens` a resume asks for, and `below` in tiers.

        `is_waiting`: a turn of it is open; `is_running`: it has begun. Nothing anywhere: its row goes.
        """
        row = self._rows.get(trace_id)
        if num_blocks == 0 and below == NOTHING:
            if row is not None:
                self._count(row, 0)
                del self._rows[trace_id]
            return
        if row is None:
            row = self._rows[trace_id] = _Row()
        row.num_tokens, row.is_waiting, row.below = num_tokens, is_waiting, below
        row.num_blocks, row.is_running = num_blocks, is_running
        self._judge(trace_id, row, now)

    def refresh(self, now: float) -> None:
        """Judge again what is due, up to `MAX_JUDGED` rows; more where nobody has asked for a while."""
        num = MAX_JUDGED
        if now - self._refreshed_s > FRESH_AT_MOST_S:
            self._num_behind = len(self._rows)
        self._refreshed_s = now
        if self._num_behind:
            num += min(CATCH_UP, self._num_behind)
            self._num_behind = max(0, self._num_behind - CATCH_UP)
        for _ in range(num):
            if not self._due or self._due[0][0] > now:
                return
            _, number, trace_id = heapq.heappop(self._due)
            row = self._rows.get(trace_id)
            if row is not None and row.number == number:
                self._judge(trace_id, row, now)

    def cheapest_first(self, traces: Iterable[TraceId]) -> list[TraceId]:
        """The traces by the value of their KV at its last judgement. O(n log n)."""
        rows = self._rows
        return sorted(traces, key=lambda t: row.value if (row := rows.get(t)) is not None else 0.0)

    def worth_in_host(self, trace_id: TraceId) -> float:
        """What the trace's KV in host is worth, at its last judgement; 0 where it has none anywhere."""
        row = self._rows.get(trace_id)
        return row.host_value if row is not None else 0.0

    def worth_in_nvme(self, trace_id: TraceId) -> float:
        """The same for NVMe."""
        row = self._rows.get(trace_id)
        return row.nvme_value if row is not None else 0.0

    def check_invariants(self) -> None:
        """Raise AssertionError if the total is off. O(n), for tests."""
        assert self.kept_blocks == sum(row.kept_blocks for row in self._rows.values())
        due = {(number, trace_id) for _, number, trace_id in self._due}
        assert all((row.number, t) in due for t, row in self._rows.items())

    def _judge(self, trace_id: TraceId, row: "_Row", now: float) -> None:
        wait_s = self._gaps.median_remaining_s(trace_id, now)
        silent_s = self._gaps.silent_s(trace_id, now)
        back_s = None
        if self._planner is not None:
            back_s = self._planner.back_s(row.num_tokens, row.below)
            # A turn that runs has its KV in HBM; what lies below is for the turn after it.
            next_s = self._gaps.usual_s(trace_id) if row.is_running else wait_s
            is_queued = row.is_waiting and not row.is_running
            row.host_value = self._planner.worth_in_host(row.num_tokens, row.below, next_s, is_queued)
            row.nvme_value = self._planner.worth_in_nvme(row.num_tokens, next_s, is_queued)
        row.value = self._retention.value(
            Holding(row.num_tokens, wait_s, row.is_waiting, None if silent_s is None else now - silent_s, back_s)
        )
        keeps = not row.is_waiting and self._admission.keeps(row.num_tokens, wait_s, back_s)
        self._count(row, row.num_blocks if keeps else 0)
        self._num_judged += 1
        row.number = self._num_judged
        soon_s = FRESH_S if wait_s is None or math.isinf(wait_s) else FRESH_SHARE * wait_s
        heapq.heappush(self._due, (now + min(max(FRESH_S, soon_s), FRESH_AT_MOST_S), row.number, trace_id))
        if len(self._due) > 64 + 4 * len(self._rows):  # mostly superseded judgements
            self._due = [d for d in self._due if (r := self._rows.get(d[2])) is not None and r.number == d[1]]
            heapq.heapify(self._due)

    def _count(self, row: "_Row", kept_blocks: int) -> None:
        self.kept_blocks += kept_blocks - row.kept_blocks
        row.kept_blocks = kept_blocks


class _Row:
    __slots__ = (
        "below",
        "host_value",
        "is_running",
        "is_waiting",
        "kept_blocks",
        "num_blocks",
        "num_tokens",
        "number",
        "nvme_value",
        "value",
    )

    def __init__(self) -> None:
        self.num_blocks = self.num_tokens = self.kept_blocks = self.number = 0
        self.is_waiting = self.is_running = False
        self.value = self.host_value = self.nvme_value = 0.0
        self.below = NOTHING

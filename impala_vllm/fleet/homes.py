"""Where each trace lives, how much KV that is a replica, and how many traces open alike.

A trace that was silent for long no longer counts as live, though its home is still remembered.
"""

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

from impala_vllm.core.types import TraceId
from impala_vllm.fleet.places import BlockKey, Replica
from impala_vllm.fleet.scoring import Load

LIVE_S = 900.0
"""p99 of recorded gaps."""


class Home(NamedTuple):
    """One trace's."""

    replica: Replica
    num_tokens: int
    opening: BlockKey | None
    """First block of its prompts."""
    last_s: float


class Homes:
    """Keeps `Load.live_tokens` and `num_traces` in step with where live traces are."""

    def __init__(self, loads: Mapping[Replica, Load]) -> None:
        self._loads = loads
        self._homes: dict[TraceId, Home] = {}
        self._live: OrderedDict[TraceId, None] = OrderedDict()
        """Silent the longest first."""
        self._openings: Counter[BlockKey] = Counter()
        """Of live traces."""

    @property
    def num_live(self) -> int:
        """Live traces."""
        return len(self._live)

    def get(self, trace_id: TraceId) -> Home | None:
        """Where the trace was served last."""
        return self._homes.get(trace_id)

    def num_sharing(self, opening: BlockKey) -> int:
        """Live traces that open so."""
        return self._openings[opening]

    def put(self, trace_id: TraceId, home: Home) -> None:
        """The trace is served there from now on."""
        self._end(trace_id)
        self._homes[trace_id] = home
        self._live[trace_id] = None
        self._add(home, home.num_tokens, 1)
        if home.opening is not None:
            self._openings[home.opening] += 1

    def forget(self, trace_id: TraceId) -> None:
        """The trace is over."""
        self._end(trace_id)
        self._homes.pop(trace_id, None)

    def leave(self, replica: Replica) -> None:
        """The replica has lost all KV: nobody lives there any more."""
        for trace_id in [t for t, home in self._homes.items() if home.replica == replica]:
            self.forget(trace_id)

    def expire(self, now: float) -> None:
        """Traces silent for long are not live. O(expired)."""
        while self._live:
            oldest = next(iter(self._live))
            if self._homes[oldest].last_s > now - LIVE_S:
                return
            self._end(oldest)

    def _end(self, trace_id: TraceId) -> None:
        if trace_id not in self._live:
            return
        del self._live[trace_id]
        home = self._homes[trace_id]
        self._add(home, -home.num_tokens, -1)
        if home.opening is not None:
            self._openings[home.opening] -= 1
            if not self._openings[home.opening]:
                del self._openings[home.opening]

    def _add(self, home: Home, num_tokens: int, num_traces: int) -> None:
        load = self._loads.get(home.replica)
        if load is not None:
            load.live_tokens += num_tokens
            load.num_traces += num_traces

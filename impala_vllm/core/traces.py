"""Traces and the table that bounds them: who is alive, who is whose child, who goes first.

The table keeps facts in order of activity. Whose request is whose is decided in `core.identity`.
"""

from collections import OrderedDict
from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING

from impala_vllm.core.types import BlockHash, Namespace, Outcome, RequestId, Source, TraceId

if TYPE_CHECKING:
    from impala_vllm.core.identity.chain import Chain
    from impala_vllm.core.identity.parentage import Suspect


MAX_NESTING = 8
"""Ancestors of a trace: agents that start agents are two or three deep, and activity is noted all the way up."""


class State(Enum):
    """What a trace is doing, as far as its requests show."""

    RUNNING = "running"
    """At least one request waits or runs."""
    GAP = "gap"
    """Silent after an output that asks for more, a tool call for instance."""
    ENDED = "ended"
    """Silent after an output that asks for nothing. A further turn revives it."""


class Trace:
    """One agent run. Written by `core.identity` alone; everybody else reads."""

    __slots__ = (
        "chains",
        "children",
        "confidence",
        "first_request_id",
        "last_event_s",
        "last_finish_s",
        "last_outcome",
        "last_request_id",
        "namespace",
        "num_running",
        "num_tokens",
        "num_turns",
        "opening",
        "parent_trace_id",
        "session_id",
        "source",
        "started_s",
        "suspects",
        "trace_id",
    )

    def __init__(self, trace_id: TraceId, namespace: Namespace, request_id: RequestId, now: float) -> None:
        self.trace_id = trace_id
        self.namespace = namespace
        self.session_id: str | None = None
        """What the client calls it, where it does."""
        self.parent_trace_id: TraceId | None = None
        self.children: dict[TraceId, None] = {}
        """Live children, oldest first."""
        self.chains: list[Chain] = []
        """Its conversations, the least recently used first: several roles may take turns in one trace."""
        self.opening: BlockHash | None = None
        """Last block of the stem it started with: what kind of agent it is. None: no known stem."""
        self.suspects: list[Suspect] = []
        """Who may be its parent, likeliest first."""
        self.first_request_id = request_id
        self.last_request_id = request_id
        self.num_turns = 0
        self.num_running = 0
        self.num_tokens = 0
        """Tokens of the last prompt, and of its output once finished."""
        self.source = Source.NEW
        self.confidence = 0.0
        self.started_s = now
        self.last_event_s = now
        self.last_finish_s: float | None = None
        self.last_outcome: Outcome | None = None

    @property
    def state(self) -> State:
        """Running, in a gap, or to all appearances ended."""
        if self.num_running:
            return State.RUNNING
        return State.ENDED if self.is_done and not self.children else State.GAP

    @property
    def is_done(self) -> bool:
        """Its own last output asked for nothing, whatever its children do."""
        return not self.num_running and self.last_outcome in (Outcome.STOP, Outcome.ERROR, Outcome.ABORT)


class TraceTable:
    """Traces by id, least recently active first. Iterates in that order."""

    def __init__(self) -> None:
        self._traces: OrderedDict[TraceId, Trace] = OrderedDict()

    def __len__(self) -> int:
        return len(self._traces)

    def __iter__(self) -> Iterator[Trace]:
        return iter(self._traces.values())

    def __contains__(self, trace_id: object) -> bool:
        return trace_id in self._traces

    def get(self, trace_id: TraceId | None) -> Trace | None:
        """The trace, None when it is unknown or forgotten."""
        return None if trace_id is None else self._traces.get(trace_id)

    def add(self, trace: Trace) -> None:
        """Enter a trace as the most recently active one."""
        self._traces[trace.trace_id] = trace

    def adopt(self, trace: Trace, parent: Trace | None) -> None:
        """Make `parent` the trace's parent, or nobody. Loops and more than `MAX_NESTING` levels: nobody."""
        above, levels = parent, 0
        while above is not None:
            levels += 1
            if above is trace or levels > MAX_NESTING:
                parent = None
                break
            above = self.get(above.parent_trace_id)
        before = self.get(trace.parent_trace_id)
        if before is not None:
            before.children.pop(trace.trace_id, None)
        trace.parent_trace_id = None
        if parent is not None:
            trace.parent_trace_id = parent.trace_id
            parent.children[trace.trace_id] = None

    def drained_by(self, trace: Trace) -> TraceId | None:
        """The silent parent that waits for no child any more, now that `trace` is done; else None. O(its children)."""
        parent = self.get(trace.parent_trace_id)
        if parent is None or parent.num_running or not trace.is_done:
            return None
        children = (self.get(child) for child in parent.children)
        return parent.trace_id if all(child is None or child.is_done for child in children) else None

    def touch(self, trace: Trace, now: float) -> None:
        """Note activity, of the trace and of the ancestors that wait for it."""
        seen: Trace | None = trace
        while seen is not None:
            seen.last_event_s = max(seen.last_event_s, now)
            self._traces.move_to_end(seen.trace_id)
            seen = self.get(seen.parent_trace_id)

    def remove(self, trace: Trace) -> None:
        """Take a trace out; its parent lets go of it, its children become roots of their own."""
        del self._traces[trace.trace_id]
        parent = self.get(trace.parent_trace_id)
        if parent is not None:
            parent.children.pop(trace.trace_id, None)

    def idle(self) -> Iterator[Trace]:
        """Traces that may go, least recently active first: no request of theirs or of a child is open."""
        return (trace for trace in self._traces.values() if not trace.num_running and not trace.children)

"""Whose child is a new trace: sub-agents share no prefix with their parent, so time and shape decide.

A sub-agent starts right after its parent's output asked for a tool, and the parent stays silent while
it works. Many traces may have just fallen silent, so they are all suspects; those that speak again
before the child is done drop out. Which openings belong to sub-agents is learned on the way.
"""

from collections import OrderedDict, deque
from itertools import islice
from typing import NamedTuple

from impala_vllm.core.traces import State, Trace, TraceTable
from impala_vllm.core.types import BlockHash, Namespace, Outcome, TraceId

MAX_SUSPECTS = 16
"""Suspects remembered a trace, the last to fall silent first."""
MAX_SILENT = 4096
"""Outputs remembered a tenant; only the last `subagent_window_s` of them are ever used."""
MAX_OPENINGS = 4096
"""Openings whose kind is remembered."""
SURE_TURNS = 3
"""Turns of a child after which a suspect that is still silent counts as learned evidence."""


class Suspect(NamedTuple):
    """A trace that had just fallen silent, and how many turns it had by then."""

    trace_id: TraceId
    num_turns: int


class Parentage:
    """Suspects of young traces, and what has been learned about openings."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._silent: OrderedDict[tuple[str, str], deque[tuple[float, Suspect]]] = OrderedDict()
        """By tenant and salt, the one noted last at the end; none is empty."""
        self._openings: OrderedDict[BlockHash, list[int]] = OrderedDict()

    def note_end(self, trace: Trace, now: float) -> None:
        """A trace fell silent; only one that waits for a tool can be waiting for a child."""
        if trace.num_running or now <= trace.last_event_s:  # a log that does not say when turns end
            return
        if trace.last_outcome not in (Outcome.TOOL_CALL, Outcome.UNKNOWN):
            return
        scope = _scope(trace.namespace)
        silent = self._silent.setdefault(scope, deque(maxlen=MAX_SILENT))
        silent.append((now, Suspect(trace.trace_id, trace.num_turns)))
        self._prune(silent, now)
        self._silent.move_to_end(scope)
        # Clients choose salts, one a request if they like: a scope goes with the last output in its window.
        while next(iter(self._silent.values()))[-1][0] < now - self._window_s:
            self._silent.popitem(last=False)

    def suspects(self, namespace: Namespace, now: float, traces: TraceTable) -> list[Suspect]:
        """Traces that fell silent within the window and still are, the last one first."""
        scope = _scope(namespace)
        silent = self._silent.get(scope)
        if silent is None:
            return []
        self._prune(silent, now)
        if not silent:
            del self._silent[scope]
        waiting = (suspect for _, suspect in reversed(silent) if _waits(suspect, traces) is not None)
        return list(islice(waiting, MAX_SUSPECTS))

    def parent(self, trace: Trace, traces: TraceTable) -> Trace | None:
        """The likeliest parent of a trace as of now; None while nothing speaks for one.

        Drops suspects that have spoken since. The first turn alone is no evidence, unless the opening is
        known to be mostly a sub-agent's.
        """
        trace.suspects = [s for s in trace.suspects if _waits(s, traces) is not None]
        kind = self._openings.get(trace.opening) if trace.opening is not None else None
        if trace.num_turns < 2 and (kind is None or kind[0] <= 2 * kind[1]):
            return None
        return _waits(trace.suspects[0], traces) if trace.suspects else None

    def learn(self, trace: Trace) -> None:
        """Remember whether the trace's opening was a sub-agent's. Call once, at turn `SURE_TURNS`."""
        if trace.opening is None or trace.num_turns != SURE_TURNS:
            return
        kind = self._openings.setdefault(trace.opening, [0, 0])
        kind[0 if trace.suspects else 1] += 1
        self._openings.move_to_end(trace.opening)
        if len(self._openings) > MAX_OPENINGS:
            self._openings.popitem(last=False)

    def _prune(self, silent: deque[tuple[float, Suspect]], now: float) -> None:
        while silent and silent[0][0] < now - self._window_s:
            silent.popleft()


def _waits(suspect: Suspect, traces: TraceTable) -> Trace | None:
    """The suspect if it has been silent ever since."""
    trace = traces.get(suspect.trace_id)
    if trace is None or trace.num_turns != suspect.num_turns or trace.state is not State.GAP:
        return None
    return trace


def _scope(namespace: Namespace) -> tuple[str, str]:
    """Sub-agents often run another model than their parent, never for another tenant."""
    return namespace.tenant, namespace.salt

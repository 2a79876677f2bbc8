"""Who is suspected of being a parent, and for how long that is remembered."""

from impala_vllm.core.identity.parentage import Parentage
from impala_vllm.core.traces import Trace, TraceTable
from impala_vllm.core.types import Namespace, Outcome, RequestId, TraceId


def silent(number: int, now: float, parentage: Parentage, traces: TraceTable) -> Trace:
    """A trace of a salt of its own that asked for a tool and fell silent at `now`."""
    trace = Trace(TraceId(f"t{number}"), Namespace(salt=f"s{number}"), RequestId(f"r{number}"), now - 1)
    trace.last_outcome = Outcome.TOOL_CALL
    traces.add(trace)
    parentage.note_end(trace, now)
    return trace


def test_scopes_are_forgotten_with_the_last_output_in_their_window() -> None:
    parentage, traces = Parentage(window_s=2.0), TraceTable()
    for number in range(1000):
        silent(number, float(number), parentage, traces)
    assert len(parentage._silent) == 3
    last = traces.get(TraceId("t999"))
    assert last is not None
    assert [s.trace_id for s in parentage.suspects(last.namespace, 1000.0, traces)] == ["t999"]


def test_asking_late_finds_nobody_and_leaves_nothing_behind() -> None:
    parentage, traces = Parentage(window_s=2.0), TraceTable()
    trace = silent(1, 1.0, parentage, traces)
    assert parentage.suspects(trace.namespace, 10.0, traces) == []
    assert parentage._silent == {}
    silent(2, 11.0, parentage, traces)
    assert len(parentage._silent) == 1

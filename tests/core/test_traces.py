"""Who waits for whom: a parent is drained by the last of its children, and by nobody else."""

import pytest

from impala_vllm.core.traces import State, Trace, TraceTable
from impala_vllm.core.types import Namespace, Outcome, RequestId, TraceId


class Family:
    """A silent parent with two children that run."""

    def __init__(self) -> None:
        self.table = TraceTable()
        self.parent = self.add("parent", num_running=0, outcome=Outcome.TOOL_CALL)
        self.first = self.add("first", self.parent)
        self.second = self.add("second", self.parent)

    def add(
        self, name: str, parent: Trace | None = None, num_running: int = 1, outcome: Outcome | None = None
    ) -> Trace:
        trace = Trace(TraceId(name), Namespace(), RequestId(name), 0.0)
        trace.num_running, trace.last_outcome = num_running, outcome
        self.table.add(trace)
        self.table.adopt(trace, parent)
        return trace

    def end(self, trace: Trace, outcome: Outcome = Outcome.STOP) -> TraceId | None:
        trace.num_running, trace.last_outcome = 0, outcome
        return self.table.drained_by(trace)


def test_the_last_child_drains_its_parent() -> None:
    family = Family()
    assert family.end(family.second) is None
    assert family.end(family.first) == "parent"


@pytest.mark.parametrize("outcome", [Outcome.STOP, Outcome.ERROR, Outcome.ABORT])
def test_a_child_that_failed_is_waited_for_no_longer(outcome: Outcome) -> None:
    family = Family()
    family.end(family.first, outcome)
    assert family.end(family.second) == "parent"


def test_a_child_that_called_a_tool_will_be_back() -> None:
    family = Family()
    family.end(family.first)
    assert family.end(family.second, Outcome.TOOL_CALL) is None


def test_a_parent_that_speaks_waits_for_nobody() -> None:
    family = Family()
    family.end(family.first)
    family.parent.num_running = 1
    assert family.end(family.second) is None


def test_a_child_with_children_that_are_done_is_done() -> None:
    family = Family()
    grandchild = family.add("grandchild", family.first)
    family.end(family.second)
    assert family.end(grandchild) is None, "its own parent runs"
    assert family.end(family.first) == "parent"
    assert family.first.state is State.GAP, "its child may still be asked for again"


def test_a_child_the_table_forgot_and_a_root_drain_nobody() -> None:
    family = Family()
    family.table.remove(family.first)
    assert family.end(family.second) == "parent"
    assert family.end(family.parent) is None

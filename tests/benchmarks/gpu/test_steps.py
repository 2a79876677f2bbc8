"""Which steps run, in which order, within which budget; their launch is a list here, their clock a number."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from benchmarks.gpu import steps
from benchmarks.gpu.steps import STEPS, Outcome, Status, Step


@dataclass
class Machine:
    """Steps take as long as it says; those it names fail."""

    takes_s: Callable[[Step], float]
    fails: tuple[str, ...] = ()
    now_s: float = 0.0
    limits: dict[str, float] = field(default_factory=dict[str, float])

    def launch(self, step: Step, limit_s: float) -> Outcome:
        self.limits[step.name] = limit_s
        self.now_s += min(limit_s, self.takes_s(step))
        return Outcome(step.name, Status.FAILED if step.name in self.fails else Status.DONE)

    def run(self, chosen: list[Step], budget_s: float) -> dict[str, Outcome]:
        said: list[str] = []
        outcomes = steps.run(chosen, budget_s, self.launch, said.append, lambda: self.now_s)
        assert [line.partition(":")[0] for line in said] == [s.name for s in chosen]
        return {o.name: o for o in outcomes}


def test_every_step_says_something_whatever_became_of_those_before():
    machine = Machine(lambda step: 1.0, fails=("device", "link"))
    outcomes = machine.run(list(STEPS), 10_000)
    assert outcomes.keys() == {s.name for s in STEPS}
    assert outcomes["bandwidth"].status is Status.DONE


def test_a_step_is_left_out_where_the_one_it_stands_on_failed():
    outcomes = Machine(lambda step: 1.0, fails=("ops",)).run(list(STEPS), 10_000)
    assert outcomes["bandwidth"].status is Status.SKIPPED
    assert "ops" in outcomes["bandwidth"].why
    assert outcomes["engine-graphs"].status is Status.DONE


def test_a_step_stands_alone_where_the_one_it_stands_on_was_not_asked_for():
    outcomes = Machine(lambda step: 1.0, fails=("ops",)).run(steps.pick(["bandwidth"]), 10_000)
    assert outcomes["bandwidth"].status is Status.DONE


def test_the_budget_is_never_outrun_and_what_it_leaves_out_is_said():
    machine = Machine(lambda step: 1e9)
    outcomes = machine.run(list(STEPS), 540)
    assert machine.now_s <= 540
    assert "are left" in outcomes["sessions-8b-impala"].why


def test_a_shorter_step_still_runs_where_a_longer_one_no_longer_fits():
    machine = Machine(lambda step: 1.0)
    outcomes = machine.run([s for s in STEPS if s.name in ("sessions-8b-stock", "tune", "link")], 40)
    assert [name for name, o in outcomes.items() if o.status is Status.DONE] == ["link", "tune"]


def test_a_step_gets_no_more_than_what_is_left():
    machine = Machine(lambda step: 10.0)
    machine.run(steps.pick(["device", "link"]), 60)
    assert machine.limits == {"device": 60, "link": 50}


def test_two_calls_of_a_loan_of_fifteen_minutes_hold_what_matters():
    upto = next(i for i, s in enumerate(STEPS) if s.name == f"sessions-1b-{steps.ARMS[-1]}")
    essential = [s for s in STEPS[: upto + 1] if s.instead_of is None]
    assert {s.name for s in essential} >= {
        *("ops", "bandwidth", "worker", "engine-impala", "engine-impala-v1"),
        *(f"sessions-1b-{arm}" for arm in steps.ARMS),
    }
    assert sum(s.needs_s for s in essential) <= 540
    large = steps.pick(["sessions-8b"])
    assert [s.name for s in large[:2]] == ["sessions-8b-stock", "sessions-8b-impala"]
    assert sum(s.needs_s for s in large[:2]) <= 200


def test_a_step_that_stands_in_for_another_is_left_out_where_that_was_done():
    two = steps.pick(["engine-graphs", "engine-eager"])
    assert Machine(lambda step: 1.0).run(two, 1000)["engine-eager"].why == "needless after engine-graphs"
    failed = Machine(lambda step: 1.0, fails=("engine-graphs",)).run(two, 1000)
    assert failed["engine-eager"].status is Status.DONE
    alone = Machine(lambda step: 1.0).run(steps.pick(["engine-eager"]), 1000)
    assert alone["engine-eager"].status is Status.DONE


def test_steps_are_picked_by_name_or_first_words():
    assert [s.name for s in steps.pick(["sessions-8b", "link"])] == [
        *("link", "sessions-8b-stock", "sessions-8b-impala", "sessions-8b-upstream")
    ]
    assert "sessions-8b-stock" not in [s.name for s in steps.pick(without=["sessions"])]
    assert all(s.rehearses for s in steps.pick(rehearsal=True))
    with pytest.raises(ValueError, match="no step 'sess'"):
        steps.pick(["sess"])


def test_every_step_names_a_function_that_takes_its_arguments():
    import importlib
    import inspect

    for step in STEPS:
        module, _, function = step.function.partition(":")
        found = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
        inspect.signature(found).bind(None, **dict(step.arguments))

"""How few replicas are enough: the least number that does as well, and what is said of it."""

from dataclasses import replace

import pytest

from impala_vllm.sim import report
from impala_vllm.sim.fewest import fewest
from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.question import Asked, ask
from impala_vllm.sim.simulation import run
from tests.sim.scenes import TIMING
from tests.sim.test_question import log


@pytest.fixture(scope="module")
def question():
    return ask(log(10), Asked(TIMING, num_replicas=4, hbm_tokens=100, load=1.5))


def test_the_least_number_that_does_as_well_is_found(question):
    def on(num_replicas):
        return run(question.workload, replace(question.setup, num_replicas=num_replicas), KINDS["stock"])

    tried = []
    # What two replicas do two can do, four as well, and one cannot.
    assert on(4).measures.stall_mean_s < on(2).measures.stall_mean_s < on(1).measures.stall_mean_s
    assert fewest(question, KINDS["stock"], on(2).measures, on(4), lambda n: tried.append(n)) == 2
    assert tried == [2, 1]


def test_whoever_does_worse_with_all_is_not_tried_with_fewer(question):
    stock = run(question.workload, question.setup, KINDS["stock"])
    worse = replace(stock, measures=replace(stock.measures, stall_mean_s=stock.measures.stall_mean_s + 1.0))
    slower = replace(stock, measures=replace(stock.measures, tasks_per_hour=0.9 * stock.measures.tasks_per_hour))
    for with_all in (worse, slower):
        assert fewest(question, KINDS["stock"], stock.measures, with_all, pytest.fail) is None


def test_what_could_be_done_without_is_said():
    first, second, third = report.spared(8, {"impala": 5, "plas": None, "mars": 8})
    assert first.startswith("On 5 replicas impala lets tasks wait no longer than stock on 8 replicas")
    assert first.endswith("3 could be done without.")
    assert "plas does not do as well" in second
    assert third.endswith("none could be done without.")


def test_turns_kept_back_for_longer_than_clients_wait_are_said(question):
    outcome = run(question.workload, question.setup, KINDS["stock"])
    assert report.holds({"stock": outcome}) is None
    long = replace(outcome, measures=replace(outcome.measures, max_hold_s=1980.0))
    said = report.holds({"stock": outcome, "thunderagent": long})
    assert said is not None
    assert said.endswith("thunderagent 1,980 s.")


@pytest.mark.parametrize(
    ("value", "base", "said"),
    [
        (2.0, 1.0, "+100%"),
        (1.0, 1.0, "the same"),
        (0.0, 0.0, "the same"),
        (1.0, 0.0, "more"),
        (1.004, 1.0, "the same"),
        (0.5, 1.0, "-50%"),
    ],
)
def test_a_change_is_said_against_what_it_is_a_change_of(value, base, said):
    assert report.change(value, base) == said

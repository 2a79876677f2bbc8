"""The simulator's validation: the same plan on both sides, the same cost of a step, and small differences."""

import dataclasses

import pytest

pytest.importorskip("vllm")

from benchmarks.sim import lowered, validation
from benchmarks.sim.validation import Pair
from benchmarks.virtual.bench import BLOCK_SIZE, Bench
from benchmarks.virtual.engine import TIMINGS
from impala_vllm.core.types import Outcome
from impala_vllm.plugin import register
from impala_vllm.replay import synthetic, tiny_model
from impala_vllm.replay.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def bench():
    register()
    model = tiny_model.build("1m")
    return Bench(model, Vocabulary.of_model(model), TIMINGS["cpu-26m"], 128)


def test_a_plan_keeps_its_blocks_lengths_and_gaps(bench):
    plan = synthetic.fan_out(bench.vocabulary, num_parents=2, num_forks=3)
    load = lowered.workload(plan, BLOCK_SIZE, bench.vocabulary)
    assert load.num_turns() == plan.num_turns()
    assert load.working_set_tokens() == pytest.approx(plan.working_set_tokens(), rel=0.05)
    for (_, _, planned), turn in zip(plan.turns(), load.turns(), strict=True):
        assert (turn.prompt_tokens, turn.output_tokens) == (len(planned.prompt), len(planned.output))
        assert (turn.gap_s, turn.joins) == (planned.gap_s, planned.joins)
    assert {t.outcome for t in load.turns()} <= {Outcome.STOP, Outcome.TOOL_CALL, Outcome.LENGTH}


def test_simulated_and_virtual_agree_on_forks_and_joins(bench):
    plan = synthetic.fan_out(bench.vocabulary, num_parents=3, num_forks=4)
    pairs = validation.compare(bench, plan, level=2.0)
    by_policy = {p.policy: p for p in pairs}
    for policy in ("stock", "unbounded"):
        assert by_policy[policy].stall_s == pytest.approx(by_policy[policy].virtual_stall_s, rel=0.05)
    assert all(v.is_close for v in validation.verdicts(pairs))
    assert validation.same_ranking(pairs)


def test_an_arm_that_is_off_and_arms_that_change_places_are_said():
    good = [Pair("stock", 10.0, 10.0, 0.1, 0.1), Pair("impala", 5.0, 5.0, 0.5, 0.5), Pair("unbounded", 1, 1, 0.9, 0.9)]
    assert all(v.is_close for v in validation.verdicts(good))
    assert validation.same_ranking(good)
    off = [dataclasses.replace(good[0], stall_s=4.0), *good[1:]]
    assert [v.is_close for v in validation.verdicts(off)] == [False, True, True]
    assert not validation.same_ranking(off)
    fewer_hits = [good[0], dataclasses.replace(good[1], hit_ratio=0.4), good[2]]
    assert [v.is_close for v in validation.verdicts(fewer_hits)] == [True, False, True]


def test_hits_are_compared_as_a_ratio_and_nothing_is_like_nothing():
    assert Pair("stock", 1, 1, 0.45, 0.5).hits == pytest.approx(0.9)
    assert Pair("stock", 1, 1, 0.001, 0.008).hits == 1.0
    assert Pair("stock", 1, 1, 0.2, 0.0).hits > 2

"""Continuum and InferCept, which keep KV through a tool call or drop it.

Examples are computed by hand: 1 s a step, 0.5 s a prompt token, 0.25 s a decode.
"""

import pytest

from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.policies.continuum import Continuum, DynamicContinuum, best_ttl_s, eta
from impala_vllm.sim.policies.infercept import InferCept
from impala_vllm.sim.policies.programs import Program
from tests.sim.scenes import Scene, session, workload


def in_a_call(policy, gap_s):
    """What a session of 16 tokens finds after a tool call beside one that decodes and one of 20 tokens that waits.

    The first two are prefilled together until 11.0; the decodes after that take 1.25 s each. Of ten blocks the waiting
    one needs five, and only four are neither the session's nor the decoding one's.
    """
    load = workload(
        session("a", [16, 20], output=1, gap_s=gap_s), session("c", [4], output=20), session("b", [20], output=1)
    )
    scene = Scene(load, num_blocks=10, policy=policy).play(0.0, 0.0, 5.0)
    return next(s for s in scene.client.served if s.index == 1).cached_tokens


def test_continuum_keeps_kv_for_two_seconds_and_not_for_longer():
    assert in_a_call(Continuum, gap_s=1.5) == 16
    assert in_a_call(KINDS["stock"].make, gap_s=1.5) < 16
    assert in_a_call(Continuum, gap_s=60.0) < 16


def test_continuum_lets_pinned_programs_first_then_the_older():
    load = workload(
        session("young", [8, 12], output=1, gap_s=0.5),
        session("blocker", [40], output=1),
        session("old", [8], output=1),
    )
    scene = Scene(load, policy=Continuum, max_num_seqs=1).play(6.0, 11.2, 11.1)
    # Young ends at 11.0, is back at 11.5 and pinned; old (11.1) runs then; blocker (11.2) came before it but after.
    assert scene.order() == ["young", "old", "young", "blocker"]


@pytest.mark.parametrize(
    ("gaps", "cost_s", "best_s"),
    [
        # P x cost - t: 0.5 x 10 - 1 = 4 at 1 s, 1 x 10 - 9 = 1 at 9 s.
        ([1.0, 9.0], 10.0, 1.0),
        # 0.5 x 30 - 1 = 14 at 1 s, 1 x 30 - 9 = 21 at 9 s.
        ([1.0, 9.0], 30.0, 9.0),
        ([5.0, 9.0], 4.0, 0.0),
    ],
)
def test_the_time_to_live_is_where_hits_less_holding_are_most(gaps, cost_s, best_s):
    assert best_ttl_s(gaps, cost_s) == best_s


def test_eta_is_one_for_programs_of_one_length_and_less_for_many():
    assert eta([]) == 1.0
    assert eta([5, 5, 5]) == pytest.approx(1.0)
    # Done and left: (1,1) (2,0) and (1,3) (2,2) (3,1) (4,0): covariance -25/6, both variances 41/6.
    assert eta([2, 4]) == pytest.approx(25 / 41)


def test_dynamic_continuum_starts_with_two_seconds_and_learns():
    scene = Scene(workload(session("a", [8, 12], output=1)), policy=DynamicContinuum)
    policy = scene.replica.policy
    assert isinstance(policy, DynamicContinuum)
    program = Program("x", 0.0)
    program.tool, program.tokens = "Bash", 20
    assert policy.ttl_s(program) == 2.0
    policy._gaps = {None: [30.0] * 100, "Bash": [3.0] * 99}
    assert policy.ttl_s(program) == 0.0  # 20 tokens cost 10 s, all tools take 30
    policy._gaps["Bash"].append(3.0)
    assert policy.ttl_s(program) == 3.0


def test_infercept_drops_kv_once_keeping_wastes_more_than_computing_it_again():
    scene = Scene(workload(session("a", [16, 20], output=1, gap_s=1000.0)), policy=InferCept)
    policy = scene.replica.policy
    assert isinstance(policy, InferCept)
    program = Program("a", 0.0)
    program.tokens, program.acting_since_s = 20, 0.0
    # Computing 20 tokens takes 10 s: with 60 tokens beside it that wastes 10 x 80, as 40 s of keeping do.
    assert policy.discard(program, 60) == 800.0
    assert policy.preserve(program, 40.0) == 800.0
    assert policy.preserve(program, 39.0) < 800.0 < policy.preserve(program, 41.0)


def test_infercept_keeps_a_short_call_and_drops_a_long_one():
    assert in_a_call(InferCept, gap_s=3.0) == 16
    assert in_a_call(InferCept, gap_s=60.0) < 16

"""The shipped policy in the simulator: core's own objects, and worth having where memory is short."""

from impala_vllm.core.admission import Admission
from impala_vllm.core.identity import Identity
from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.policies.impala import Impala
from impala_vllm.sim.simulation import Setup, run
from tests.sim.scenes import TIMING, Scene, session, with_gaps, workload
from tests.sim.test_simulation import agents


def test_it_is_made_of_cores_objects():
    scene = Scene(workload(session("a", [4])), policy=Impala)
    policy = scene.replica.policy
    assert isinstance(policy, Impala)
    assert isinstance(policy.identity, Identity)
    assert isinstance(policy.admission, Admission)


def test_sessions_are_recognised_by_their_blocks():
    scene = Scene(workload(session("a", [16, 24, 32]), session("b", [16, 24])), policy=Impala).play()
    policy = scene.replica.policy
    assert isinstance(policy, Impala)
    assert len(policy.identity.traces) == 2
    assert {t.num_turns for t in policy.identity.traces} == {2, 3}


def test_of_two_that_wait_the_one_with_less_to_compute_goes_first():
    load = workload(session("first", [4], output=4), session("long", [60], output=1), session("short", [8], output=1))
    assert Scene(load, policy=Impala).play(0.0, 0.5, 0.6).order() == ["first", "short", "long"]
    assert Scene(load).play(0.0, 0.5, 0.6).order() == ["first", "long", "short"]


def test_where_memory_is_short_sessions_stall_less_than_on_stock():
    setup = Setup(TIMING, hbm_tokens=200)
    stock, impala = (run(agents(), setup, KINDS[name]).measures for name in ("stock", "impala"))
    assert impala.stall_mean_s < 0.8 * stock.stall_mean_s
    assert impala.hit_ratio > stock.hit_ratio


def test_what_is_kept_back_is_admitted_within_the_bound():
    load = workload(*(with_gaps(session(f"s{i}-", [40, 48, 56, 64], output=4), 1.0, 1.0, 1.0) for i in range(6)))
    scene = Scene(load, num_blocks=20, policy=Impala).play()
    held = [s.held_s for s in scene.client.served]
    assert 0 < max(held) < 300

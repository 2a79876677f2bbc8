"""What policies that price the loss of KV pay for it with tiers below HBM, by hand.

1 s a step, 0.5 s a prompt token, blocks of 4 tokens; a block takes 0.25 s from host.
"""

import pytest

from impala_vllm.sim.policies.continuum import DynamicContinuum
from impala_vllm.sim.policies.infercept import InferCept
from impala_vllm.sim.policies.programs import Program
from impala_vllm.sim.policies.reload import Reload, computed, loaded
from impala_vllm.sim.policy import Policy
from impala_vllm.sim.tiers import Room
from tests.sim.scenes import Scene, session, workload

HBM_ALONE = None
BELOW = Room(100, 100, block_bytes=40, host_bytes_per_s=160.0, nvme_read_bytes_per_s=40.0, nvme_write_bytes_per_s=None)


def replica_of(policy=Policy, below=BELOW):
    return Scene(workload(session("a", [16, 20], output=1)), policy=policy, below=below).replica


def silent(tokens=20, since_s=0.0):
    """A program in a tool, of five blocks."""
    program = Program("a", 0.0)
    program.tokens, program.acting_since_s, program.keys = tokens, since_s, tuple(range(1, tokens // 4 + 1))
    return program


def fill(store, keys):
    store.reserve(keys)
    store.commit(keys)


def test_without_tiers_a_context_is_computed_again():
    replica = replica_of(below=HBM_ALONE)
    assert loaded(replica, (1, 2, 3), 12) == computed(replica, 12) == Reload(0.0, 6.0)


def test_what_host_has_is_loaded_and_the_rest_computed():
    replica = replica_of()
    fill(replica.tiers.host, [1, 2, 3])
    fill(replica.tiers.host, [5])  # behind a hole
    assert loaded(replica, (1, 2, 3, 4, 5), 20) == Reload(3 * 0.25, 8 * 0.5)


def test_what_is_on_its_way_into_host_counts():
    replica = replica_of()
    replica.tiers.host.reserve([1, 2])
    assert loaded(replica, (1, 2), 8) == Reload(0.5, 0.0)


def test_what_nvme_alone_has_counts_as_lost():
    replica = replica_of()
    fill(replica.tiers.host, [1])
    fill(replica.tiers.nvme, [1, 2, 3])
    assert loaded(replica, (1, 2, 3), 12) == Reload(0.25, 8 * 0.5)


def test_a_load_queues_behind_those_before_it():
    replica = replica_of()
    fill(replica.tiers.host, [1, 2])
    replica.tiers.loads.send(400, lambda took_s: None)
    assert loaded(replica, (1, 2), 8).load_s == 2.5 + 0.5


def test_infercept_swaps_what_host_has_where_that_wastes_less_than_keeping_it():
    policy = replica_of(InferCept).policy
    assert isinstance(policy, InferCept)
    program = silent()
    fill(policy.replica.tiers.host, program.keys)
    # 1.25 s of loading hold 20 tokens and nobody waits; computing holds them for 10 s, and 60 others wait.
    assert policy.swap(program, 60, 0.0) == 25.0
    assert policy.discard(program, 60) == 800.0
    assert policy.preserve(program, 1.25) == 25.0


def test_infercept_has_others_wait_for_what_no_tier_has():
    policy = replica_of(InferCept).policy
    assert isinstance(policy, InferCept)
    program = silent()
    fill(policy.replica.tiers.host, program.keys[:3])
    # 0.75 s of loading and 4 s of computing for its own 20 tokens; the 4 s for 60 others as well.
    assert policy.swap(program, 60, 0.0) == 4.75 * 20 + 4.0 * 60


def released_s(policy, below):
    """When a session of 16 tokens that goes silent at 9 s is no longer kept in HBM, beside one that decodes."""
    load = workload(session("a", [16, 20], output=1, gap_s=200.0), session("c", [4], output=300))
    scene = Scene(load, policy=policy, below=below)
    seen: list[float] = []
    plan = scene.replica.policy.plan

    def noting(now):
        order = plan(now)
        if now > 12.0 and not seen and "a" not in scene.replica.policy.pins:
            seen.append(now)
        return order

    scene.replica.policy.plan = noting
    for when_s in range(13, 250):  # a plan a second, though nothing changes
        scene.loop.at(float(when_s), scene.replica._wake)
    scene.play(0.0, 0.0)
    return seen[0]


def test_infercept_keeps_kv_for_as_long_as_bringing_it_back_takes():
    # In host it has 4 blocks, a second: as good as nothing beside the 8.5 s, and the others', of computing them.
    assert released_s(InferCept, BELOW) < 20.0 < released_s(InferCept, HBM_ALONE)


def test_infercept_keeps_a_swapped_copy_in_host_until_it_is_back():
    below = Room(6, 0, 40, 160.0, None, None)
    load = workload(
        session("a", [16, 20], output=1, gap_s=60.0),
        *(session(f"b{i}", [20], output=1) for i in range(3)),
    )

    def found(policy):
        served = Scene(load, num_blocks=6, policy=policy, below=below).play(0.0, 20.0, 32.0, 44.0).client.served
        return next(s.cached_tokens for s in served if s.index == 1)

    assert found(InferCept) == 16
    assert found(Policy) == 0


@pytest.mark.parametrize(
    ("below", "found", "ttl_s"),
    [
        (HBM_ALONE, 1.0, 3.0),  # 10 s of computing are worth 3 s of waiting,
        (BELOW, 1.0, 0.0),  # 1.25 s of loading are not,
        (BELOW, 0.5, 3.0),  # and 5.6 s are: half of what is written to host is gone again.
    ],
)
def test_dynamic_continuum_pays_for_a_load_where_there_is_a_copy(below, found, ttl_s):
    policy = replica_of(DynamicContinuum, below).policy
    assert isinstance(policy, DynamicContinuum)
    program = silent()
    if policy.replica.tiers is not None:
        fill(policy.replica.tiers.host, program.keys)
    policy._gaps = {None: [3.0] * 100}
    policy._found.add(found)
    assert policy.reload_s(program) == (10.0 if below is HBM_ALONE else 1.25 * found + 10.0 * (1 - found))
    assert policy.ttl_s(program) == ttl_s


def test_dynamic_continuum_never_pays_more_than_computing_takes():
    slow = Room(100, 0, block_bytes=40, host_bytes_per_s=10.0, nvme_read_bytes_per_s=None, nvme_write_bytes_per_s=None)
    policy = replica_of(DynamicContinuum, slow).policy
    assert isinstance(policy, DynamicContinuum)
    program = silent()
    fill(policy.replica.tiers.host, program.keys)
    assert policy.reload_s(program) == 10.0


@pytest.mark.parametrize(("below", "found"), [(BELOW, 1.0), (Room(2, 0, 40, 160.0, None, None), 0.0)])
def test_dynamic_continuum_learns_how_much_of_a_copy_is_found(below, found):
    load = workload(session("a", [16, 20], output=1, gap_s=60.0), session("b", [20], output=1))
    scene = Scene(load, num_blocks=6, policy=DynamicContinuum, below=below).play(0.0, 20.0)
    policy = scene.replica.policy
    assert isinstance(policy, DynamicContinuum)
    # The turns of 16 and 20 tokens: HBM of six blocks has the first block of the one at best after the other.
    assert policy._found.value >= found
    assert (policy._found.value == 1.0) is (found == 1.0)

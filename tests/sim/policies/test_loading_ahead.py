"""KVFlow and TokenCake, which load what resumes before it does.

Examples are computed by hand: 1 s a step, 0.5 s a prompt token, 0.25 s a decode.
"""

from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.policies.kvflow import KvFlow
from impala_vllm.sim.policies.tokencake import TokenCake
from impala_vllm.sim.tiers import Room
from tests.sim.scenes import TIMING, Scene, session, with_gaps, workload


def resumed_at(policy, *calls_s, second_call_s=None):
    """When a session of 16 tokens has its first token after each call, while another one takes all of HBM meanwhile.

    Six blocks of HBM, a host that holds everything; its link takes 1 s for the four blocks of the session.
    """
    load = workload(
        with_gaps(session("a", [16] * (len(calls_s) + 1), output=1, tool="Bash"), *calls_s),
        *(session(f"b{i}", [20], output=1) for i in range(len(calls_s))),
    )
    below = Room(100, 0, TIMING.kv_bytes_per_token * 4, 160.0, None, None)
    starts, now = [0.0], 9.0
    for call_s in calls_s:
        starts.append(now + 1.0)
        now += call_s + 3.0
    scene = Scene(load, num_blocks=6, policy=policy, below=below).play(*starts)
    return [s.first_s - s.start_s for s in scene.client.served if s.session_id == "a" and s.index > 0]


def test_kvflow_has_loaded_what_resumes_when_it_resumes():
    # A step of 1 s and 4 tokens of 0.5 s are left of a turn that finds all but its last block. Stock has
    # lost two blocks to the other session, which take 0.25 s each on the link.
    (stock,), (kvflow,) = resumed_at(KINDS["stock"].make, 60.0), resumed_at(KvFlow, 60.0)
    assert kvflow == 3.0
    assert stock == 3.5


def test_tokencake_learns_how_long_a_tool_takes_and_uploads_by_then():
    # Of Bash nothing is known at first: 1 s is less than twice the way, and nothing is offloaded. Then it took 60 s.
    first, second = resumed_at(TokenCake, 60.0, 61.0)
    stock = resumed_at(KINDS["stock"].make, 60.0, 61.0)
    assert first == stock[0]
    assert second == 3.0 < stock[1]


def test_tokencake_averages_calls_by_tool():
    scene = Scene(workload(session("a", [8], output=1)), policy=TokenCake)
    policy = scene.replica.policy
    assert isinstance(policy, TokenCake)
    for took_s in (4.0, 8.0):
        policy._learn("Bash", took_s)
    assert policy.expected_s("Bash") == 6.0
    assert policy.expected_s("Read") == 1.0


def test_tokencake_gives_up_whoever_is_longest_in_a_call_first():
    scene = Scene(workload(session("a", [8], output=1)), policy=TokenCake)
    policy = scene.replica.policy
    assert isinstance(policy, TokenCake)
    policy._offloaded = {"soon": 10.0, "late": 90.0}
    policy._used_s = {"soon": 5.0, "late": 4.0, "idle": 2.0, "busy": 3.0}
    assert policy._offloaded_first(["busy", "soon", "idle", "late"]) == ["late", "soon", "idle", "busy"]

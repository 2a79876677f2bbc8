"""ThunderAgent and CONCUR, which hold whole programs back while memory is short."""

from impala_vllm.sim.policies.concur import Concur
from impala_vllm.sim.policies.programs import Program
from impala_vllm.sim.policies.thunderagent import BUFFER_TOKENS, ThunderAgent, ThunderAgentProxy
from tests.sim.scenes import Scene, session, with_gaps, workload


def test_thunderagent_counts_half_of_a_context_after_each_second_in_a_tool():
    scene = Scene(workload(session("a", [16, 20], output=1)), num_blocks=100, policy=ThunderAgent)
    policy = scene.replica.policy
    program = Program("x", 0.0)
    program.tokens, program.acting_since_s = 64, 10.0
    assert isinstance(policy, ThunderAgent)
    assert policy._claim(program, 10.0) == BUFFER_TOKENS + 64
    assert policy._claim(program, 13.0) == BUFFER_TOKENS + 8
    assert ThunderAgentProxy.weight(policy, 13.0) == 1.0  # type: ignore[arg-type]


def test_thunderagent_holds_a_new_program_that_finds_no_room():
    # Room for 800. Large and small act; big comes with 500 tokens: 500 + 300 + 100 and their buffers are too much.
    load = workload(
        session("large", [199], output=1, gap_s=0.0),
        with_gaps(session("small", [99, 103], output=1), 60.0),
        session("big", [299], output=100),
    )
    scene = Scene(load, num_blocks=200, policy=ThunderAgentProxy)
    policy = scene.replica.policy
    assert isinstance(policy, ThunderAgentProxy)
    paused: list[tuple[float, list[str]]] = []
    plan = policy.plan

    def noting(now):
        chosen = plan(now)
        if not paused or paused[-1][1] != list(policy.paused):
            paused.append((now, list(policy.paused)))
        return chosen

    policy.plan = noting
    scene.play(0.0, 0.0, 0.0)
    # 200 + 100 + 400 tokens of claims with a hundred each do not fit: big has to wait for large to end.
    assert paused[0][1] == ["big"]
    assert scene.client.served[-1].session_id in ("big", "small")
    assert next(s for s in scene.client.served if s.session_id == "big").held_s > 0


def test_thunderagent_pauses_the_smallest_in_a_tool_and_resumes_it_when_there_is_room():
    policy = Scene(workload(session("a", [8])), num_blocks=200, policy=ThunderAgentProxy).replica.policy
    assert isinstance(policy, ThunderAgentProxy)
    for name, tokens in (("large", 500), ("small", 150)):
        program = policy.programs._programs[name] = Program(name, 0.0)
        program.tokens, program.acting_since_s = tokens, 0.0
    # Room for 800; claims with their buffers are 600 + 250.
    policy.plan(5.0)
    assert list(policy.paused) == ["small"]
    policy.programs._programs["large"].tokens = 400
    policy.plan(9.0)
    assert list(policy.paused) == ["small"]
    policy.plan(10.0)
    assert not policy.paused


def test_concur_holds_agents_outside_its_window_and_halves_it_where_caching_fails():
    load = workload(*(session(f"s{i:02}", [8], output=1) for i in range(12)))
    scene = Scene(load, policy=Concur)
    policy = scene.replica.policy
    assert isinstance(policy, Concur)
    scene.play()
    assert sum(s.held_s > 0 for s in scene.client.served) == 12 - 8
    policy.window = 8.0
    scene.replica.pool.take(60)
    policy._prompt_tokens, policy._cached_tokens = 100, 10
    policy._check()
    assert policy.window == 4.0
    policy._prompt_tokens, policy._cached_tokens = 100, 90
    policy._check()
    assert policy.window == 4.0


def test_concur_widens_its_window_while_memory_is_hardly_used():
    scene = Scene(workload(session("a", [8], output=1)), policy=Concur)
    policy = scene.replica.policy
    assert isinstance(policy, Concur)
    policy.window = 1.0
    for name in "abcd":
        policy.programs._programs[name] = Program(name, 0.0)
    policy._check()
    assert policy.window == 3.0

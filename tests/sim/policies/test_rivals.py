"""Published policies against examples computed by hand: 1 s a step, 0.5 s a prompt token, 0.25 s a decode."""

import math
from dataclasses import replace

import pytest

from impala_vllm.core.types import TraceId
from impala_vllm.sim.policies import KINDS, mars, plas
from impala_vllm.sim.policies.atlas import Atlas
from impala_vllm.sim.policies.belady import Belady
from impala_vllm.sim.policies.concur import Concur
from impala_vllm.sim.policies.continuum import Continuum, DynamicContinuum, best_ttl_s, eta
from impala_vllm.sim.policies.infercept import InferCept
from impala_vllm.sim.policies.kvflow import KvFlow
from impala_vllm.sim.policies.leveled import Leveled
from impala_vllm.sim.policies.mars import Mars
from impala_vllm.sim.policies.oracle import Oracle
from impala_vllm.sim.policies.plas import Plas
from impala_vllm.sim.policies.programs import Program
from impala_vllm.sim.policies.thunderagent import BUFFER_TOKENS, ThunderAgent, ThunderAgentProxy
from impala_vllm.sim.policies.tokencake import TokenCake
from impala_vllm.sim.simulation import Setup, run
from impala_vllm.sim.tiers import Room
from tests.sim.scenes import TIMING, Scene, session, with_gaps, workload
from tests.sim.test_client import family
from tests.sim.test_simulation import agents

RIVALS = [name for name, kind in KINDS.items() if name not in ("stock", "impala") and not kind.is_unbounded]


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("hbm_tokens", [104, 140, 200])
def test_however_short_memory_is_every_turn_is_served(name, hbm_tokens):
    """Pins, pauses and windows must never leave an engine idle for good; `run` asserts that all is served."""
    load = agents(count=10)
    load = replace(load, sessions=tuple(with_gaps(s, *([0.5, 40.0, 0.5, 7.0, 90.0])) for s in load.sessions))
    found = run(load, Setup(TIMING, hbm_tokens), KINDS[name])
    assert found.measures.makespan_s < 100 * run(load, Setup(TIMING, hbm_tokens), KINDS["stock"]).measures.makespan_s


def families(count, parent_tokens, child_tokens):
    """Parents whose second turn waits for two children of the first; one of those waits for a child of its own."""
    made = []
    for i in range(count):
        parent, child, other, below = (
            session(f"{name}{i}", [tokens, tokens + 4], output=3, gap_s=1.0 + i, stem=8)
            for name, tokens in zip("pcob", (parent_tokens, child_tokens, child_tokens, child_tokens), strict=True)
        )
        for above, names in ((parent, (f"c{i}", f"o{i}")), (child, (f"b{i}",))):
            turns = (above.turns[0], replace(above.turns[1], joins=names))
            made.append(replace(above, turns=turns, parent_id=None if above is parent else f"p{i}", after_turn=0))
        made.append(replace(other, parent_id=f"p{i}", after_turn=0))
        made.append(replace(below, parent_id=f"c{i}", after_turn=0))
    return workload(*(replace(s, after_turn=-1) if s.parent_id is None else s for s in made))


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("host_tokens", [0, 400])
@pytest.mark.parametrize(("count", "parent_tokens", "child_tokens"), [(1, 600, 450), (1, 900, 900), (6, 300, 200)])
def test_nobody_waits_for_ever_for_a_child(name, host_tokens, count, parent_tokens, child_tokens):
    load = families(count, parent_tokens, child_tokens)
    found = run(load, Setup(TIMING, 1000, host_tokens=host_tokens), KINDS[name])
    assert len(found.served) == load.num_turns()


def test_plas_puts_a_program_that_had_much_behind_one_that_had_little(monkeypatch):
    monkeypatch.setattr(plas, "LEVEL_TOKENS", (20, 40, 80))
    monkeypatch.setattr(plas, "BETA", 1e9)
    load = workload(session("old", [30, 36], output=1, gap_s=2.0), session("new", [8], output=1))
    # "block" runs from 17.9 s on; old's second turn and new wait for its seat. Old has had 30 tokens, new none.
    load = workload(*load.sessions, session("block", [8], output=1))
    starts = (0.0, 19.5, 17.9)
    assert Scene(load, policy=Plas, max_num_seqs=1).play(*starts).order() == ["old", "block", "new", "old"]
    assert Scene(load, max_num_seqs=1).play(*starts).order() == ["old", "block", "old", "new"]


def test_plas_lifts_a_program_that_waited_beta_times_its_service(monkeypatch):
    monkeypatch.setattr(plas, "LEVEL_TOKENS", (20, 1000, 2000))
    load = workload(session("old", [30, 36], output=1, gap_s=2.0), session("block", [200], output=1))

    def end_s():
        return Scene(load, policy=Plas, max_num_seqs=1).play(0.0, 17.0).ends()["old", 1]

    # Old was served for 16 s and is back at 18; block's first chunk of 64 tokens ends at 50. By then old has waited for
    # twice its service, takes the seat and computes the 8 tokens it does not find.
    assert end_s() == 50.0 + 1.0 + 8 * 0.5
    monkeypatch.setattr(plas, "BETA", 2.1)
    assert end_s() > 55.0


def test_plas_takes_the_seat_of_a_program_with_more_service(monkeypatch):
    monkeypatch.setattr(plas, "LEVEL_TOKENS", (20, 40, 80))
    load = workload(session("long", [30], output=40), session("new", [8], output=1))
    scene = Scene(load, policy=Plas, max_num_seqs=1).play(0.0, 20.0)
    # long: prefill until 16.0, then decodes of 1.25 s; the one that runs at 20 s ends at 21.0; then new's 5 s.
    assert scene.ends()["new", 0] == 21.0 + 1.0 + 8 * 0.5
    assert scene.replica.num_preemptions == 1


@pytest.mark.parametrize("name", ["plas", "atlas", "mars"])
def test_whoever_loses_its_seat_waits_from_then_on(name):
    load = workload(session("long", [30], output=40), session("new", [8], output=1))
    scene = Scene(load, policy=KINDS[name].make, max_num_seqs=1)
    policy, seen = scene.replica.policy, list[tuple[float, float, float | None]]()
    assert isinstance(policy, Leveled)
    policy.gives_way = lambda now: [r for r in scene.replica.running if now == 21.0]
    preempted = policy.preempted

    def noting(request, now):
        preempted(request, now)
        program = policy.programs.of(request)
        assert program.placed_s is None
        since_s = policy._since_s[request] if isinstance(policy, Mars) else program.waits_since_s
        seen.append((since_s, program.waited_s, program.served_s))

    policy.preempted = noting
    scene.play(0.0, 20.0)
    assert seen == [(21.0, 0.0, 21.0)]


@pytest.mark.parametrize("name", ["plas", "atlas", "mars"])
def test_a_short_turn_does_not_wait_for_the_prompt_of_a_long_one(name, monkeypatch):
    monkeypatch.setattr(plas, "LEVEL_TOKENS", (20, 1000, 2000))
    monkeypatch.setattr(mars, "PREFILL_TOKENS", (20, 1000, 2000))
    load = workload(session("long", [640], output=1), session("short", [8], output=1))

    def served(policy):
        scene = Scene(load, num_blocks=200, policy=policy).play(0.0, 40.0)
        return scene.ends()["short", 0], scene.ends()["long", 0], scene.replica.num_preemptions

    # Steps of 64 tokens take 33 s: one ends at 66, the next has the short prompt and 56 tokens of the long one.
    assert served(KINDS[name].make) == (99.0, 335.0, 0)
    assert served(KINDS["stock"].make)[0] > 330.0


@pytest.mark.parametrize("name", ["plas", "atlas", "mars"])
def test_whoever_would_take_blocks_of_a_prompt_under_way_does_not_overtake_it(name, monkeypatch):
    monkeypatch.setattr(plas, "LEVEL_TOKENS", (20, 1000, 2000))
    monkeypatch.setattr(mars, "PREFILL_TOKENS", (20, 1000, 2000))
    load = workload(session("long", [640], output=1), session("short", [8], output=1))
    scene = Scene(load, num_blocks=161, policy=KINDS[name].make)
    scene.replica.policy.admits = lambda request: True
    assert scene.play(0.0, 40.0).order() == ["long", "short"]
    assert scene.replica.num_preemptions == 0


def test_a_step_never_takes_back_tokens_it_has_given(monkeypatch):
    """Blocks would be found whose KV was never computed."""
    monkeypatch.setattr(plas, "LEVEL_TOKENS", (6, 1000, 2000))
    load = workload(session("much", [15], output=12), session("little", [3], output=28))
    scene = Scene(load, num_blocks=9, policy=Plas)
    chosen, victim = [], scene.replica.policy.victim

    def noting(left):
        chosen.append((victim(left).session.session_id, [r.session.session_id for r in left]))
        return victim(left)

    scene.replica.policy.victim = noting
    scene.play(0.0, 0.0)
    assert chosen
    assert all(name in left for name, left in chosen)
    assert scene.replica.num_preemptions == len(chosen)


def test_plas_promotes_for_a_quantum_and_counts_anew(monkeypatch):
    monkeypatch.setattr(plas, "LEVEL_TOKENS", (20, 1000, 2000))
    scene = Scene(workload(session("a", [64, 70], output=1)), policy=Plas)
    policy, seen = scene.replica.policy, []
    assert isinstance(policy, Plas)
    arrive = policy.arrive

    def arriving(request, now):
        arrive(request, now)
        if request.index == 0:
            return
        program = policy.programs.of(request)
        program.served_s, program.waits_since_s = 5.0, now - 10.0
        scene.replica.waiting[request] = None
        policy.gives_way(now)
        seen.extend([policy.level(request, now), program.waited_s, program.served_s])
        request.service_tokens += 21
        seen.append(policy.level(request, now))
        del scene.replica.waiting[request]

    policy.arrive = arriving
    scene.play()
    assert seen == [0, 0.0, 0.0, 1]


def test_atlas_counts_the_longest_chain_of_service_only():
    load = family()
    sibling = replace(load.sessions[1], session_id="d", turns=load.sessions[1].turns[:1])
    scene = Scene(replace(load, sessions=(*load.sessions, sibling)), policy=Atlas)
    policy = scene.replica.policy
    assert isinstance(policy, Atlas)
    begun: dict[tuple[str, int], int] = {}
    arrive = policy.arrive

    def noting(request, now):
        arrive(request, now)
        begun[request.session.session_id, request.index] = policy._begun[request]

    policy.arrive = noting
    scene.play()
    # Each turn computes 4 tokens. p0, then c0 and d0 on it, c1 on c0, and p1 on p0 and on c1.
    assert begun == {("p", 0): 0, ("c", 0): 4, ("d", 0): 4, ("c", 1): 8, ("p", 1): 12}


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


@pytest.mark.parametrize(("attained", "level"), [(0, 0), (2048, 0), (2049, 1), (3072, 1), (3073, 2), (3585, 3)])
def test_mars_demotes_by_quanta(attained, level):
    assert mars.feedback(attained) == level


def test_mars_ranks_by_what_is_left_to_prefill_and_lifts_what_waits(monkeypatch):
    monkeypatch.setattr(mars, "PREFILL_TOKENS", (10, 20, 40))
    load = workload(session("first", [8], output=4), session("long", [44], output=1), session("short", [8], output=1))
    assert Scene(load, policy=Mars, max_num_seqs=1).play(0.0, 0.5, 0.6).order() == ["first", "short", "long"]
    monkeypatch.setattr(mars, "AGEING_S", 2.0)
    assert Scene(load, policy=Mars, max_num_seqs=1).play(0.0, 0.5, 0.6).order() == ["first", "long", "short"]


def test_mars_gives_up_the_heaviest_kv_of_a_level_first():
    load = workload(
        session("light", [16, 20], output=1, gap_s=60.0), session("heavy", [24, 28], output=1, gap_s=61.0),
        session("new", [12], output=1),
    )  # fmt: skip
    scene = Scene(load, num_blocks=11, policy=Mars)
    scene.replica.policy.admits = lambda request: True
    scene.play(0.0, 0.0, 40.0)
    cached = {s.session_id: s.cached_tokens for s in scene.client.served if s.index == 1}
    assert cached["light"] == 16
    assert cached["heavy"] < 24


def test_mars_lets_a_program_in_when_the_contexts_of_those_inside_leave_room():
    load = workload(session("in", [40, 44], output=1, gap_s=20.0), session("out", [30], output=1))
    scene = Scene(load, num_blocks=16, policy=Mars).play(0.0, 5.0)
    # 41 and 30 tokens are more than 64: out waits for the end of in.
    assert scene.order() == ["in", "in", "out"]
    assert next(s for s in scene.client.served if s.session_id == "out").held_s > 20.0
    assert Scene(load, num_blocks=32, policy=Mars).play(0.0, 5.0).order() == ["in", "out", "in"]


def test_mars_lets_sub_agents_in_with_their_parent():
    load = family()
    scene = Scene(load, num_blocks=4, policy=Mars).play()
    assert all(s.held_s == 0.0 for s in scene.client.served)


def test_belady_gives_up_what_is_used_last():
    load = workload(
        session("soon", [16, 20], output=1, gap_s=60.0), session("late", [16, 20], output=1, gap_s=200.0),
        session("new", [8], output=1),
    )  # fmt: skip
    starts = (0.0, 20.0, 40.0)
    cached = {}
    for policy in (Belady, KINDS["stock"].make):
        served = Scene(load, num_blocks=9, policy=policy).play(*starts).client.served
        cached[policy] = {s.session_id: s.cached_tokens for s in served if s.index == 1}
    # Nine blocks: four of each session, one fresh. The new prompt and its output take three: two are given up.
    assert cached[Belady]["soon"] == 16
    assert cached[KINDS["stock"].make]["soon"] < 16


def test_the_oracle_knows_when_a_trace_is_back():
    scene = Scene(workload(session("a", [16, 20], output=1, gap_s=60.0)), policy=Oracle)
    policy = scene.replica.policy
    assert isinstance(policy, Oracle)
    seen: list[float | None] = []
    scene.loop.at(
        39.5, lambda: seen.append(policy.gaps.median_remaining_s(next(iter(policy.identity.traces)).trace_id, 39.5))
    )
    scene.play()
    # The first turn ends at 9 s and the second begins at 69.
    assert seen == [29.5]


def test_the_oracle_waits_for_a_parent_that_is_late():
    # It is expected after the tools that are recorded; what the turns of its child take is the server's doing.
    load, late = family(), []
    scene = Scene(load, policy=Oracle)
    policy = scene.replica.policy
    assert isinstance(policy, Oracle)
    parent, served = load.roots()[0].session_id, scene.client.served

    def look():
        name = policy._silent.get(parent)
        if name is not None and not any(s.session_id == parent and s.index == 1 for s in served):
            late.append(policy.gaps.quantile_remaining_s(name, 0.5, scene.loop.now))
        if len(served) < load.num_turns():
            scene.loop.at(scene.loop.now + 0.5, look)

    scene.loop.at(0.5, look)
    scene.play()
    assert 0.0 in late, "it was overdue"
    assert math.inf not in late


def test_the_oracle_gives_up_a_trace_whose_session_came_back_as_another():
    one = session("a", [16, 16], output=1, gap_s=20.0)
    other = session("b", [16], output=1).turns[0]
    load = workload(replace(one, turns=(one.turns[0], replace(other, gap_s=20.0))))
    scene = Scene(load, policy=Oracle)
    policy = scene.replica.policy
    assert isinstance(policy, Oracle)
    told: list[float | None] = []
    scene.loop.at(10.0, lambda: told.append(policy.gaps.quantile_remaining_s(policy._silent["a"], 0.5, 10.0)))
    names: list[TraceId] = []
    scene.loop.at(10.0, lambda: names.append(policy._silent["a"]))
    scene.loop.at(30.0, lambda: told.append(policy.gaps.quantile_remaining_s(names[0], 0.5, 30.0)))
    scene.play()
    assert told == [19.0, math.inf]


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

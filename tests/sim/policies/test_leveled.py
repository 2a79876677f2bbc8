"""PLAS, ATLAS and MARS, which rank by levels of service, and what all three do.

Examples are computed by hand: 1 s a step, 0.5 s a prompt token, 0.25 s a decode.
"""

from dataclasses import replace

import pytest

from impala_vllm.sim.policies import KINDS, mars, plas
from impala_vllm.sim.policies.atlas import Atlas
from impala_vllm.sim.policies.leveled import Leveled
from impala_vllm.sim.policies.mars import Mars
from impala_vllm.sim.policies.plas import Plas
from tests.sim.scenes import Scene, session, workload
from tests.sim.test_client import family


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

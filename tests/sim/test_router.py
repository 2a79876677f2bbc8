"""The router level: where turns of a fleet go, and what routers are told."""

from random import Random

import pytest

from impala_vllm.core.types import Namespace
from impala_vllm.fleet.index import MaskIndex
from impala_vllm.fleet.places import Replica, ServerId, Tier
from impala_vllm.sim.client import Client
from impala_vllm.sim.loop import Loop
from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.replica import Replica as Engine
from impala_vllm.sim.router import Router
from impala_vllm.sim.routers import ROUTERS, Ask, Machines, Peer
from impala_vllm.sim.scheduler import Shape
from impala_vllm.sim.simulation import Setup, run
from impala_vllm.sim.tiers import Room
from tests.sim.scenes import BLOCK, TIMING, session, workload
from tests.sim.test_simulation import agents


def machines(count=2, hbm_tokens=400):
    return Machines([Replica(ServerId(f"r{i}")) for i in range(count)], TIMING, hbm_tokens, Random(0))


def ask(name="a", num_blocks=10, is_last=False, start=0, num_output=1):
    keys = [start + i for i in range(num_blocks)]
    return Ask(f"{name}{start}", name, is_last, Namespace(), keys, BLOCK, num_blocks * BLOCK, num_output)


class Noting(Peer):
    """Sends everything to one replica and keeps what it is told."""

    def __init__(self, to=0):
        self.to = to
        self.index = MaskIndex()
        self.places = machines().places
        self.said = []

    def pick(self, ask, running, now):
        self.said.append(("ask", now, tuple(running)))
        return self.to

    def answered(self, ask, number, now):
        self.said.append(("answered", now, number))

    def ended(self, ask, number, now):
        self.said.append(("ended", now, number))

    def stored(self, number, tier, keys, now):
        self.index.store(self.places[number], tier, keys, now)

    def removed(self, number, tier, keys):
        self.index.remove(self.places[number], tier, keys)


def served_through(peer, load, num_blocks=100, below=None):
    loop = Loop()
    shape = Shape(num_blocks, BLOCK, 8, 64, below)
    engines = [Engine(loop, TIMING, shape, KINDS["stock"].make, set()) for _ in range(2)]
    client = Client(loop, load, Router(loop, engines, peer).send)
    client.start(load.roots(), [0.0] * len(load.roots()))
    loop.run()
    assert len(client.served) == load.num_turns()
    return engines


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("policy", ["stock", "impala"])
@pytest.mark.parametrize("host_tokens", [0, 200])
def test_every_router_serves_all_turns_and_twice_the_same(router, policy, host_tokens):
    load = agents(count=8)
    setup = Setup(TIMING, 140, num_replicas=3, host_tokens=host_tokens, router=router)
    first, again = (run(load, setup, KINDS[policy]) for _ in range(2))
    assert first == again


def test_a_router_is_told_of_first_tokens_and_ends():
    peer = Noting(to=1)
    served_through(peer, workload(session("a", [8], output=3)))
    # A prefill of 8 tokens, 5 s, and two decodes of 1.25 s.
    assert peer.said == [("ask", 0.0, (0, 0)), ("answered", 5.0, 1), ("ended", 7.5, 1)]


def test_a_router_sees_what_is_under_way():
    peer = Noting()
    served_through(peer, workload(session("a", [8], output=3), session("b", [8], output=3)))
    assert [running for what, _, running in peer.said if what == "ask"] == [(0, 0), (1, 0)]


def test_what_routers_are_told_is_what_replicas_hold():
    below = Room(8, 16, TIMING.kv_bytes_per_token * BLOCK, 160.0, 80.0, 80.0)
    load = workload(*(session(f"s{i}", [16, 24, 30], output=3, gap_s=3.0 + i, stem=8) for i in range(4)))
    peer = Noting()
    engine, _ = served_through(peer, load, num_blocks=12, below=below)
    keys = {key for turn in load.turns() for key in turn.keys}
    assert engine.tiers is not None
    held = {Tier.HBM: engine.pool.has, Tier.HOST: engine.tiers.host.is_ready, Tier.NVME: engine.tiers.nvme.is_ready}
    assert any(engine.pool.has(key) for key in keys)
    assert engine.pool.num_evicted > 0
    for key in keys:
        assert peer.index.holds(peer.places[0], key) == {tier for tier, has in held.items() if has(key)}


def test_sticky_begins_where_fewest_sessions_are_until_they_end():
    peer = ROUTERS["sticky"].make(machines())
    idle = [0, 0]
    assert [peer.pick(ask(n), idle, 0.0) for n in "abc"] == [0, 1, 0]
    last = ask("b", is_last=True)
    assert peer.pick(last, idle, 1.0) == 1
    assert peer.pick(ask("d"), idle, 1.0) == 1
    peer.ended(last, 1, 2.0)
    assert [peer.pick(ask(n), idle, 2.0) for n in "aef"] == [0, 1, 0]


def test_sticky_spreads_sessions_of_one_turn():
    peer = ROUTERS["sticky"].make(machines(4))
    assert [peer.pick(ask(n, is_last=True), [0] * 4, 0.0) for n in "abcdefgh"] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_routers_that_know_nothing_go_by_turn_load_or_name():
    robin, least, hashed = (ROUTERS[n].make(machines(3)) for n in ("round-robin", "least-loaded", "consistent-hash"))
    assert [robin.pick(ask(), [0, 0, 0], 0.0) for _ in range(4)] == [0, 1, 2, 0]
    assert least.pick(ask(), [2, 1, 1], 0.0) == 1
    places = {n: hashed.pick(ask(n), [0, 0, 0], 0.0) for n in "abcdefgh"}
    assert {n: hashed.pick(ask(n), [9, 9, 0], 1.0) for n in "abcdefgh"} == places
    assert len(set(places.values())) > 1


def test_cache_aware_follows_a_long_match_and_leaves_an_uneven_load():
    peer = ROUTERS["cache-aware"].make(machines())
    first = peer.pick(ask("a"), [0, 0], 0.0)
    assert peer.pick(ask("b", start=100), [0, 0], 0.0) != first
    assert peer.pick(ask("a", num_blocks=12), [20, 20], 1.0) == first
    running = [0, 0]
    running[first] = 33
    assert peer.pick(ask("a", num_blocks=14), running, 2.0) != first


def test_dynamo_weighs_new_blocks_against_those_under_way():
    peer = ROUTERS["dynamo"].make(machines())
    peer.stored(1, Tier.HBM, ask().keys, 0.0)
    assert peer.pick(ask(), [0, 0], 0.0) == 1  # 0 new against 10
    # There: 10 to prefill and 10 active; elsewhere 10 new.
    second = ask("b")
    assert peer.pick(second, [0, 1], 0.0) == 0
    peer.answered(second, 0, 1.0)
    peer.ended(second, 0, 2.0)
    peer.removed(1, Tier.HBM, ask().keys)
    assert peer.pick(ask("c"), [0, 1], 3.0) == 0


def test_preble_goes_to_who_holds_most_unless_twice_as_loaded():
    peer = ROUTERS["preble"].make(machines())
    peer.stored(1, Tier.HBM, ask().keys, 0.0)
    # Nothing is missing, so that all it costs is 8 decodes of 1.25 s; a cold prompt costs 20 s.
    picked = [peer.pick(ask(num_output=8), [0, 0], 0.0) for _ in range(4)]
    assert picked == [1, 1, 1, 0]
    assert peer.pick(ask(num_output=8), [0, 0], 500.0) == 1  # work of three minutes ago is forgotten


def test_impala_goes_to_who_holds_the_prompt_in_any_tier():
    for tier in (Tier.HBM, Tier.HOST):
        peer = ROUTERS["impala"].make(machines(hbm_tokens=4000))
        prompt = ask(num_blocks=400)
        peer.stored(1, tier, prompt.keys, 0.0)
        assert peer.pick(prompt, [0, 0], 1.0) == 1
        peer.answered(prompt, 1, 2.0)
        peer.ended(prompt, 1, 3.0)
        peer.restarted(1)
        peer.stored(0, tier, prompt.keys, 4.0)
        assert peer.pick(prompt, [0, 0], 5.0) == 0

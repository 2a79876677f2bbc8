"""Turns on their way, without HTTP: sticky traces, shared stems, counts that come back to nothing."""

from random import Random

import pytest

from impala_vllm.core.types import Namespace, Outcome
from impala_vllm.fleet.hashing import Prompt
from impala_vllm.fleet.homes import LIVE_S
from impala_vllm.fleet.index import IndexConfig, MaskIndex
from impala_vllm.fleet.places import Replica, ServerId, Tier
from impala_vllm.fleet.residency import Residency
from impala_vllm.fleet.router import Router, Turn
from impala_vllm.fleet.scoring import Elsewhere, Load, Policy, Reason
from tests.contracts.fleet_index import chain

REPLICAS = [Replica(ServerId(name)) for name in "abcd"]
STEM = chain(99, 64)


class Site:
    """A router, and engines that publish what they are sent."""

    def __init__(self, num_replicas: int = 4) -> None:
        self.loads = {replica: Load(100_000) for replica in REPLICAS[:num_replicas]}
        self.router = Router(self.loads, Residency(MaskIndex(), IndexConfig()), Policy(), Random(1))
        self.now = 0.0

    def turn(self, keys, session=None, salt="", shows_first_token=True) -> Turn:
        prompt = Prompt(keys, 16 * len(keys) + 3, 0)
        return Turn(Namespace(salt=salt), prompt, 16, prompt.num_tokens, session, None, shows_first_token)

    def serve(self, keys, without=(), **more):
        """One turn from arrival to end; its blocks are published."""
        ticket = self.router.start(self.turn(keys, **more), self.loads, without, self.now)
        assert ticket is not None
        self.now += 0.5
        self.router.answer(ticket, self.now)
        self.router.residency.known.store(ticket.decision.replica, Tier.HBM, keys, self.now)
        self.now += 0.5
        self.router.end(ticket, Outcome.STOP, True, self.now)
        return ticket


def test_the_turns_of_a_trace_stay_together_without_any_id():
    site = Site()
    homes = {}
    for length in (10, 20, 30, 40):
        for trace in range(8):
            ticket = site.serve([*STEM, *chain(trace, length)])
            homes.setdefault(trace, []).append(ticket.decision.replica)
    assert all(len(set(places)) == 1 for places in homes.values())


def test_agents_that_start_at_once_wait_for_the_stem_that_is_being_computed():
    site = Site()
    for other in range(40):
        site.serve(chain(100 + other, 20))
    agents = [site.turn([*chain(7, 800), *chain(trace, 4)]) for trace in range(3)]
    tickets = [site.router.start(agent, site.loads, (), site.now) for agent in agents]
    assert len({ticket.decision.replica for ticket in tickets}) == 1
    assert [ticket.decision.cached_tokens for ticket in tickets] == [0, 12_800, 12_800]


def test_a_stem_that_everybody_wants_is_soon_everywhere():
    site = Site()
    agents = [site.turn([*chain(7, 400), *chain(trace, 4)]) for trace in range(10, 18)]
    tickets = [site.router.start(agent, site.loads, (), 0.0) for agent in agents]
    assert len({ticket.decision.replica for ticket in tickets}) >= 3


def test_a_trace_goes_on_elsewhere_when_its_server_dies():
    site = Site()
    first = site.serve(chain(1, 50))
    died = first.decision.replica
    site.loads[died].is_open = False
    site.router.leave(died)
    second = site.serve(chain(1, 60))
    assert second.decision.replica != died
    assert second.link.trace_id == first.link.trace_id


def test_loads_come_back_to_nothing_whatever_happens():
    site = Site()
    tickets = [site.router.start(site.turn(chain(seed, 30)), site.loads, (), 0.0) for seed in range(20)]
    for number, ticket in enumerate(tickets):
        if number % 3 == 0:
            site.router.answer(ticket, 1.0)
        site.router.end(ticket, Outcome.ABORT if number % 2 else Outcome.ERROR, True, 2.0)
        site.router.end(ticket, Outcome.STOP, True, 3.0)
        site.router.answer(ticket, 4.0)
    assert all((load.num_running, load.pending_s) == (0, 0.0) for load in site.loads.values())
    site.now = LIVE_S * 30
    site.router.tick(site.now)
    assert all((load.live_tokens, load.num_traces) == (0, 0) for load in site.loads.values())
    assert not site.router.residency.depths(chain(3, 30))


def test_live_tokens_follow_a_trace_that_moves():
    site = Site(2)
    first = site.serve(chain(1, 50))
    home = first.decision.replica
    (other,) = set(site.loads) - {home}
    site.loads[home].pending_s = 100.0
    assert site.serve(chain(1, 60)).decision.reason is Reason.SPILL
    assert (site.loads[home].live_tokens, site.loads[home].num_traces) == (0, 0)
    assert site.loads[other].num_traces == 1
    assert site.loads[other].live_tokens == 16 * 60 + 3


def test_nobody_left_to_try_is_no_ticket():
    site = Site(2)
    assert site.router.start(site.turn(chain(1, 5)), site.loads, set(site.loads), 0.0) is None
    assert site.serve(chain(1, 5)) is not None


def test_salts_never_learn_of_each_other():
    site = Site()
    a = site.serve(chain(1, 50), salt="a", session="s")
    b = site.serve(chain(2, 50), salt="b", session="s")  # the same text: other salts make other hashes
    assert a.link.trace_id != b.link.trace_id
    assert b.decision.cached_tokens == 0


def test_keys_that_are_no_chain_cost_what_was_learned_and_no_request():
    site = Site()
    tail = chain(5, 40)
    for opening in (1, 2):
        site.serve([*chain(opening, 40), *tail])
    assert site.router.num_broken_chains == 1
    assert site.serve([*chain(2, 40), *tail, *chain(6, 9)]) is not None


def test_an_answer_that_comes_whole_says_nothing_of_prefill():
    site = Site(1)
    before = site.router.policy.cost.prefill_s(10_000)
    site.serve(chain(1, 50), shows_first_token=False)
    assert site.router.policy.cost.prefill_s(10_000) == before
    site.serve(chain(2, 50))
    assert site.router.policy.cost.prefill_s(10_000) != before


def test_a_server_that_others_keep_busy_says_nothing_of_prefill():
    site = Site(1)
    before = site.router.policy.cost.prefill_s(10_000)
    site.loads[REPLICAS[0]].elsewhere = Elsewhere(num_running=1)
    site.serve(chain(1, 50))
    assert site.router.policy.cost.prefill_s(10_000) == before


def test_prefill_whose_end_nobody_shows_is_taken_for_over_when_it_should_be():
    site = Site(1)
    (load,) = site.loads.values()
    shown = site.router.start(site.turn(chain(1, 50)), site.loads, (), 0.0)
    whole = site.router.start(site.turn(chain(2, 50), shows_first_token=False), site.loads, (), 0.0)
    assert load.pending_s == shown.prefill.seconds + whole.prefill.seconds
    site.router.tick(load.pending_s - 0.001)
    assert load.pending_s == shown.prefill.seconds + whole.prefill.seconds
    site.router.tick(load.pending_s)
    assert load.pending_s == shown.prefill.seconds
    site.router.end(whole, Outcome.STOP, True, 9.0)
    assert (load.pending_s, load.num_running) == (shown.prefill.seconds, 1)


def test_turns_that_have_ended_are_not_kept_until_their_prefill_should_be_over():
    site = Site(1)
    running = site.router.start(site.turn(chain(9, 50), shows_first_token=False), site.loads, (), 0.0)
    for seed in range(1000):
        ticket = site.router.start(site.turn(chain(seed % 7, 5), shows_first_token=False), site.loads, (), 0.0)
        site.router.end(ticket, Outcome.STOP, True, 0.0)
    assert len(site.router._lapses) < 200
    (load,) = site.loads.values()
    assert load.pending_s == pytest.approx(running.prefill.seconds)
    site.router.tick(1e6)
    assert (load.pending_s, load.num_running, len(site.router._lapses)) == (0.0, 1, 0)


def test_a_plan_leaves_no_trace():
    site = Site()
    served = site.serve(chain(1, 50), session="s")
    before = {replica: (load.num_running, load.pending_s, load.live_tokens) for replica, load in site.loads.items()}
    plan = site.router.plan(site.turn(chain(1, 60), session="s"), site.loads)
    assert plan.decision.replica == served.decision.replica
    assert plan.decision.reason is Reason.HOME
    assert set(plan.terms) == set(site.loads)
    after = {replica: (load.num_running, load.pending_s, load.live_tokens) for replica, load in site.loads.items()}
    assert before == after


def test_a_plan_without_an_id_finds_the_prefix_of_a_trace_beside_others():
    site = Site()
    home = site.serve(chain(1, 50)).decision.replica
    site.loads[home].num_traces += 10
    assert site.router.plan(site.turn(chain(1, 60)), site.loads).decision.replica == home
    assert site.router.plan(site.turn(chain(1, 60), session="new"), site.loads).decision.replica != home


def test_turns_that_are_advised_at_once_spread_and_are_forgotten_when_they_should_be_over():
    site = Site()
    plans = [site.router.advise(site.turn(chain(seed, 200)), site.loads, 0.0) for seed in range(8)]
    assert sorted(load.num_running for load in site.loads.values()) == [2, 2, 2, 2]
    assert {plan.decision.replica for plan in plans} == set(site.loads)
    prefill_s = max(load.pending_s for load in site.loads.values()) / 2
    site.router.tick(prefill_s * 0.99)
    assert sum(load.num_running for load in site.loads.values()) == 8
    site.router.tick(prefill_s * 1.01)
    assert all((load.num_running, load.pending_s) == (0, 0.0) for load in site.loads.values())
    assert not any(site.router.residency.depths(chain(seed, 200)) for seed in range(8))


def test_turns_of_which_nothing_is_known_are_advised_to_the_less_busy_of_any_two():
    site = Site()
    turns = [site.turn(chain(seed, 200))._replace(prompt=None) for seed in range(40)]
    for turn in turns:
        site.router.advise(turn, site.loads, 0.0)
    assert all(load.num_running >= 5 for load in site.loads.values())


def test_a_guess_by_bytes_is_advised_for_a_minute_at_most():
    site = Site()
    huge = site.turn(chain(1, 5))._replace(prompt=None, num_tokens=2_000_000)
    assert site.router.policy.cost.prefill_s(huge.num_tokens) > 100
    site.router.advise(huge, site.loads, 0.0)
    site.router.tick(59.0)
    assert sum(load.num_running for load in site.loads.values()) == 1
    site.router.tick(60.0)
    assert all((load.num_running, load.pending_s) == (0, 0.0) for load in site.loads.values())


def test_agents_that_are_advised_at_once_share_the_stem_that_is_being_computed():
    site = Site()
    for other in range(40):
        site.serve(chain(100 + other, 20))
    turns = [site.turn([*chain(7, 800), *chain(trace, 4)]) for trace in range(3)]
    plans = [site.router.advise(turn, site.loads, site.now) for turn in turns]
    assert len({plan.decision.replica for plan in plans}) == 1
    assert [plan.decision.cached_tokens for plan in plans] == [0, 12_800, 12_800]

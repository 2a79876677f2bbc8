"""Where a turn goes, and why."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impala_vllm.core.cost import StepCost
from impala_vllm.fleet.index import Depths
from impala_vllm.fleet.places import Replica, ServerId
from impala_vllm.fleet.scoring import Elsewhere, Load, Policy, Question, Reason

A, B, C, D = REPLICAS = [Replica(ServerId(name)) for name in "abcd"]
RATE = StepCost().prefill_s(1)


def everywhere(blocks: int) -> Depths:
    return Depths(blocks, blocks, blocks, blocks)


def loads(**changes) -> dict[Replica, Load]:
    found = {replica: Load() for replica in REPLICAS}
    for name, fields in changes.items():
        for field, value in fields.items():
            setattr(found[Replica(ServerId(name))], field, value)
    return found


def ask(question: Question, at: dict[Replica, Load], seed=0):
    return Policy().choose(question, at, Random(seed))


def test_the_longest_prefix_wins_where_nobody_is_busy():
    decision = ask(Question(10_000, 16, {A: everywhere(100), B: everywhere(600)}), loads())
    assert (decision.replica, decision.reason, decision.cached_tokens) == (B, Reason.PREFIX, 9600)


def test_a_queue_longer_than_the_prefill_it_saves_is_not_worth_it():
    question = Question(10_000, 16, {B: everywhere(600)})
    saved_s = 9600 * RATE * 1.5  # its own time, and what others would wait
    assert ask(question, loads(b={"pending_s": 0.9 * saved_s})).replica == B
    assert ask(question, loads(b={"pending_s": 1.1 * saved_s})).replica != B


def test_a_trace_stays_through_a_little_trouble_and_leaves_a_hotspot():
    question = Question(10_000, 16, {A: everywhere(600)}, home=A)
    assert ask(question, loads(a={"pending_s": 0.9})).reason is Reason.HOME
    decision = ask(question, loads(a={"pending_s": 5.0}))
    assert decision.reason is Reason.SPILL
    assert decision.replica != A


def test_a_home_that_is_down_or_gone_is_left():
    question = Question(10_000, 16, {A: everywhere(600)}, home=A)
    assert ask(question, loads(a={"is_open": False})).replica != A
    without = loads()
    del without[A]
    assert ask(question, without).replica in (B, C, D)


def test_host_is_nearly_as_good_as_hbm_and_nvme_is_worth_half():
    policy = Policy()
    question = Question(16_000, 16, {A: Depths(0, 1000, 1000, 1000), B: Depths(0, 0, 1000, 1000), C: everywhere(1000)})
    terms = policy.explain(question, loads())
    assert terms[C].total_s == 0
    assert terms[A].total_s == pytest.approx(16_000 * RATE / 12)
    assert terms[B].total_s == pytest.approx(16_000 * RATE / 2)
    assert terms[D].prefill_s == pytest.approx(16_000 * RATE)


def test_new_blocks_go_where_they_evict_nothing_that_lives():
    full = {"capacity_tokens": 100_000, "live_tokens": 100_000}
    question = Question(10_000, 16, {})
    decision = ask(question, loads(a=full, b=full, c=full, d={"capacity_tokens": 100_000, "live_tokens": 40_000}))
    assert decision.replica == D
    assert Policy().explain(question, loads(a=full))[A].harm_s == pytest.approx(1.5 * 10_000 * RATE)


def test_a_new_trace_settles_where_fewer_live_though_none_of_them_asks_now():
    question = Question(10_000, 16, {})
    crowd = {"num_traces": 4}
    at = loads(a=crowd, b=crowd, c={"num_traces": 3}, d=crowd)
    assert ask(question, at).replica == C
    assert Policy().explain(question, at)[A].crowd_s == pytest.approx(4 * 2048 * RATE)
    at[C].elsewhere = Elsewhere(num_traces=2)  # another router's
    assert ask(question, at).replica != C


def test_a_trace_with_a_home_is_not_driven_out_by_its_neighbours():
    question = Question(10_000, 16, {A: everywhere(600)}, home=A)
    at = loads(a={"num_traces": 40})
    assert ask(question, at).reason is Reason.HOME
    assert Policy().explain(question, at)[A].crowd_s == 0.0


def test_a_stem_in_demand_is_replicated_until_enough_hold_it():
    def question(holders, sharing):
        return Question(10_000, 16, {r: everywhere(500) for r in holders}, num_sharing=sharing, num_traces=100)

    busy = {"pending_s": 0.3}
    assert ask(question([A], 1), loads(a=busy)).reason is Reason.PREFIX
    assert ask(question([A], 90), loads(a=busy)).reason is Reason.REPLICATE
    assert ask(question([A], 20), loads(a=busy)).reason is Reason.PREFIX
    assert ask(question(REPLICAS, 90), loads(a=busy)).reason is Reason.PREFIX


def test_without_hashes_the_less_busy_of_two_gets_it():
    counts = dict.fromkeys(REPLICAS, 0)
    at, lot = loads(), Random(3)
    for _ in range(400):
        decision = Policy().choose(Question(1000, 16, None), at, lot)
        assert decision.reason is Reason.BLIND
        at[decision.replica].start(0.1)
        counts[decision.replica] += 1
    assert max(counts.values()) - min(counts.values()) <= 8


def test_without_hashes_a_trace_still_stays_home():
    assert ask(Question(1000, 16, None, home=C), loads()).replica == C


def test_nobody_open_is_no_answer():
    assert ask(Question(1000, 16, {}), {A: Load(), B: Load()} | {r: _closed() for r in (A, B)}) is None


def _closed() -> Load:
    load = Load()
    load.is_open = False
    return load


def test_turns_of_equal_price_are_spread():
    at, lot = loads(), Random(1)
    seen = {Policy().choose(Question(1000, 16, {}), at, lot).replica for _ in range(50)}
    assert seen == set(REPLICAS)


depth = st.lists(st.integers(0, 700), min_size=4, max_size=4).map(lambda d: Depths(*sorted(d)))
load_of = st.builds(
    dict,
    pending_s=st.floats(0, 9),
    num_running=st.integers(0, 99),
    live_tokens=st.integers(0, 10**6),
    num_traces=st.integers(0, 99),
)


@settings(max_examples=300)
@given(
    st.integers(1, 10_000),
    st.dictionaries(st.sampled_from(REPLICAS), depth),
    st.dictionaries(st.sampled_from("abcd"), load_of),
    st.sampled_from([None, *REPLICAS]),
    st.integers(1, 50),
    st.sampled_from([None, 200_000]),
)
def test_what_is_chosen_is_what_the_terms_say(num_tokens, depths, changes, home, sharing, capacity):
    at = loads(**changes)
    for load in at.values():
        load.capacity_tokens = capacity
    question = Question(num_tokens, 16, depths, home, sharing, 50)
    policy = Policy()
    decision = policy.choose(question, at, Random(0))
    totals = {replica: terms.total_s for replica, terms in policy.explain(question, at).items()}
    assert decision.total_s == pytest.approx(totals[decision.replica])
    cheapest = min(totals.values())
    if decision.reason is Reason.HOME:
        assert decision.replica == home
    else:
        assert decision.total_s == pytest.approx(cheapest)
    assert decision.cached_tokens <= num_tokens

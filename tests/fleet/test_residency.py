"""What is known and what is expected, together."""

from impala_vllm.fleet.index import Depths, IndexConfig, MaskIndex
from impala_vllm.fleet.places import Replica, ServerId, Tier
from impala_vllm.fleet.residency import BELIEVED_S, Residency
from tests.contracts.fleet_index import chain

A, B = Replica(ServerId("a")), Replica(ServerId("b"))
KEYS = chain(1, 200)


def make() -> Residency:
    return Residency(MaskIndex(), IndexConfig())


def reach(residency: Residency, keys=KEYS) -> dict:
    return {replica: depths.remote for replica, depths in residency.depths(keys).items()}


def test_what_was_sent_there_is_expected_there_until_it_has_answered():
    residency = make()
    expected = residency.expect(A, KEYS[:100], 0, 0.0)
    assert reach(residency) == {A: 100}
    residency.settle(expected, has_events=True)
    assert reach(residency) == {}


def test_expectations_continue_what_is_known_and_one_another():
    residency = make()
    residency.known.store(A, Tier.HBM, KEYS[:50], 0.0)
    residency.known.store(B, Tier.HBM, KEYS[:20], 0.0)
    residency.expect(A, KEYS[:90], 50, 0.0)
    residency.expect(A, KEYS[:120], 90, 0.0)
    assert reach(residency) == {A: 120, B: 20}
    residency.known.store(A, Tier.HBM, KEYS[50:70], 0.0)  # the events of the first one come in
    assert reach(residency) == {A: 120, B: 20}
    assert residency.depths(KEYS)[A] == Depths(120, 120, 120, 120)  # it will lie in HBM: nothing has to be loaded


def test_what_is_expected_behind_a_lower_tier_is_loaded_no_further_than_that():
    residency = make()
    residency.known.store(A, Tier.HBM, KEYS[:20], 0.0)
    residency.known.store(A, Tier.HOST, KEYS[20:50], 0.0)
    residency.expect(A, KEYS[:90], 50, 0.0)
    assert residency.depths(KEYS)[A] == Depths(20, 90, 90, 90)


def test_of_a_server_without_events_it_stays_for_a_while():
    residency = make()
    residency.settle(residency.expect(A, KEYS, 0, 0.0), has_events=False)
    assert reach(residency) == {A: 200}
    residency.expire(2 * BELIEVED_S)
    assert reach(residency) == {}


def test_a_server_that_begins_anew_has_nothing():
    residency = make()
    residency.known.store(A, Tier.HBM, KEYS[:50], 0.0)
    residency.expect(A, KEYS, 50, 0.0)
    residency.forget(A)
    assert reach(residency) == {}


def test_no_blocks_are_nowhere():
    residency = make()
    residency.expect(A, KEYS, 0, 0.0)
    assert reach(residency, []) == {}
    assert reach(residency, chain(2, 9)) == {}

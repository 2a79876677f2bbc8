"""Places of a tier, and vLLM's order of giving them up."""

import random

import pytest

from impala_vllm.sim.store import LruStore, Store


def filled(*chains, num_blocks=4):
    store = LruStore(num_blocks)
    for chain in chains:
        store.reserve(chain)
        store.commit(chain)
    return store


def test_what_got_its_place_first_goes_first():
    store = filled([1, 2], [3, 4])
    assert store.make_room(2)
    assert [k for k in (1, 2, 3, 4) if k in store] == [3, 4]


def test_a_chain_that_was_used_loses_its_tail_first():
    store = filled([1, 2], [3, 4])
    store.touch([1, 2])
    store.touch([3, 4, 5])
    assert store.make_room(1)
    assert [k for k in (1, 2, 3, 4) if k in store] == [1, 3, 4]


def test_all_or_nothing_changes_nothing():
    store = filled([1, 2], num_blocks=2)
    store.pin([1])
    assert not store.make_room(2)
    assert not store.make_room(1, {2})
    assert store.is_ready(2)
    assert store.make_room(1)
    assert not store.may_go(1)
    store.unpin([1])
    assert store.may_go(1)


def test_being_read_does_not_count_as_use():
    store = filled([1], [2], num_blocks=2)
    store.pin([1])
    store.unpin([1])
    assert store.make_room(1)
    assert 1 not in store


def test_use_counts_while_a_block_is_read():
    store = filled([1], [2], num_blocks=2)
    store.pin([1])
    store.touch([1])
    store.unpin([1])
    assert store.make_room(1)
    assert 1 in store


@pytest.mark.parametrize("seed", range(5))
def test_it_gives_up_what_a_sorted_list_would(seed):
    rng = random.Random(seed)
    store, used, pins, filling, count = LruStore(8), {}, {}, set(), 0
    for key in range(600):
        live = sorted(used)
        match rng.randrange(5):
            case 0 if live:
                for k in reversed(chain := rng.sample(live, min(3, len(live)))):
                    count += 1
                    used[k] = count
                store.touch(chain)
            case 1 if ready := [k for k in live if k not in filling]:
                k = rng.choice(ready)
                store.pin([k])
                pins[k] = pins.get(k, 0) + 1
            case 2 if pins:
                k = rng.choice(sorted(pins))
                store.unpin([k])
                pins[k] -= 1
                if not pins[k]:
                    del pins[k]
            case 3 if filling:
                k = rng.choice(sorted(filling))
                store.commit([k])
                filling.discard(k)
            case _:
                idle = sorted((k for k in live if k not in filling and k not in pins), key=used.__getitem__)
                wanted = rng.randrange(1, 4)
                lacking = max(0, wanted - (8 - len(live)))
                spared = set(idle[:1]) if rng.random() < 0.3 else set()
                victims = [k for k in idle if k not in spared][:lacking]
                assert store.make_room(wanted, spared) == (len(victims) == lacking)
                if len(victims) == lacking:
                    for k in victims:
                        del used[k]
                    store.reserve([key])
                    count += 1
                    used[key] = count
                    filling.add(key)
        assert {k for k in used if k in store} == set(used)
        assert len(store) == len(used)
        store.check_invariants()


def test_more_than_there_is_room_for_cannot_be_reserved():
    with pytest.raises(AssertionError, match="more blocks"):
        Store(1).reserve([1, 2])

"""HBM by the block, against a model that keeps everything in plain lists."""

import random

import pytest

from impala_vllm.sim.eviction import ByTrace, Lru
from impala_vllm.sim.pool import Pool


def test_a_chain_is_found_until_its_room_is_needed_and_loses_its_tail_first():
    pool = Pool(4, Lru())
    blocks = pool.take(3)
    pool.cache(blocks, [1, 2, 3])
    pool.release(blocks)
    assert pool.find([1, 2, 3], 3) == blocks
    pool.take(2)
    assert pool.find([1, 2, 3], 3) == blocks[:2]
    assert (pool.num_evicted, pool.num_free) == (1, 2)


def test_a_block_without_a_key_is_used_again_before_any_kv_is_lost():
    pool = Pool(2, Lru())
    full, partial = pool.take(2)
    pool.cache([full], [1])
    pool.release([full, partial])
    assert pool.take(1) == [partial]
    assert pool.has(1)


def test_a_block_that_two_requests_use_is_idle_only_after_both():
    pool = Pool(2, Lru())
    blocks = pool.take(1)
    pool.cache(blocks, [1])
    pool.touch(blocks)
    pool.release(blocks)
    assert (pool.is_referenced(1), pool.num_free) == (True, 1)
    pool.release(blocks)
    assert (pool.is_referenced(1), pool.num_free) == (False, 2)


def test_of_two_blocks_with_one_key_the_second_is_found_when_the_first_is_gone():
    pool = Pool(2, Lru())
    first, second = pool.take(2)
    pool.cache([first, second], [1, 1])
    pool.release([first])
    pool.take(1)
    assert pool.find([1], 1) == [second]


def test_trace_by_trace_the_cheapest_goes_first_and_shared_stems_last():
    worth = {"dear": 2, "cheap": 1}
    order = ByTrace(lambda traces: sorted(traces, key=worth.__getitem__))
    pool = Pool(6, order)
    held = {name: pool.take(2) for name in ("dear", "cheap")}
    stem = pool.take(1)
    for name, blocks in held.items():
        pool.cache(blocks, [ord(name[0]), ord(name[0]) + 1000])
    pool.cache(stem, [7])
    pool.touch(stem)
    pool.release(held["dear"], "dear")
    pool.release(stem + held["cheap"], "cheap", num_stem=1)
    pool.release(stem, "dear", num_stem=1)
    pool.take(1)  # the block that never was used
    assert pool.take(5) == [*reversed(held["cheap"]), *reversed(held["dear"]), *stem]


def test_a_stem_that_was_idle_before_every_chain_left_goes_before_them():
    order = ByTrace(sorted)
    pool = Pool(5, order)
    first, second, stem = pool.take(1), pool.take(2), pool.take(2)
    for blocks, key in ((first, 1), (second, 2), (stem, 4)):
        pool.cache(blocks, range(key, key + len(blocks)))
    pool.release(stem + first, "a", num_stem=2)
    pool.release(second, "b")
    assert [pool.take(1)[0] for _ in range(5)] == [*first, *reversed(stem), *reversed(second)]


def test_a_spared_trace_is_passed_over_until_the_order_is_asked_for_again():
    order = ByTrace(sorted)
    pool = Pool(2, order)
    a, b = pool.take(1), pool.take(1)
    for blocks, key in ((a, 1), (b, 2)):
        pool.cache(blocks, [key])
    pool.release(a, "a")
    pool.release(b, "b")
    order.spare("a")
    order._round = ["b", "a"]  # an order that was asked for before
    assert pool.take(1) == b
    assert pool.take(1) == a


@pytest.mark.parametrize("seed", range(4))
def test_random_use_keeps_every_count_right(seed):
    rng = random.Random(seed)
    by_trace = seed % 2 == 1
    order = ByTrace(lambda traces: sorted(traces, reverse=True)) if by_trace else Lru()
    pool = Pool(12, order)
    running: list[tuple[list[int], list[int], str]] = []
    for step in range(600):
        owner = rng.choice("abcd")
        keys = [hash((owner, depth)) for depth in range(rng.randint(1, 5))]
        hits = pool.find(keys, len(keys))
        missing = len(keys) - len(hits)
        if missing + pool.num_idle_of(hits) <= pool.num_free and rng.random() < 0.6:
            pool.touch(hits)
            new = pool.take(missing)
            pool.cache(new, keys[len(hits) :])
            running.append((hits + new, keys, owner))
        elif running:
            blocks, held, owner = running.pop(rng.randrange(len(running)))
            assert all(pool.is_referenced(key) for key in held)
            pool.release(blocks, owner if by_trace else None, num_stem=rng.randint(0, 1))
        pool.check_invariants()
        if isinstance(order, ByTrace):
            order.check_invariants()
            if step % 50 == 49:
                order.release(rng.choice("abcd"))
                order.new_round()
        referenced = {b for blocks, _, _ in running for b in blocks}
        assert pool.num_free == pool.num_blocks - len(referenced)

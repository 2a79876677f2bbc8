"""Pages there and back: real tensors, a real region in /dev/shm, and nothing else is touched.

`test_page_copy_kernels` runs all of it again with Triton's interpreter.
"""

import random
from itertools import chain
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from impala_vllm.ops import Courier
from tests.adapters.vllm.tiers.sides import GROUPS, NUM_BLOCKS, PAGES, Maker, Plan, place_of, plan
from tests.ops.lanes import ManualLane


@pytest.mark.parametrize("per_chunk", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_a_store_fills_the_named_places_and_no_other(maker: Maker, per_chunk: int, seed: int) -> None:
    side, move = maker.side(per_chunk), plan(random.Random(seed), per_chunk)
    canary = torch.randint(-128, 128, side.rows().shape, dtype=torch.int8)
    side.rows().copy_(canary)
    pool = [tensor.clone() for tensor in side.pool]
    assert side.worker.submit_store(7, move.gpu(), move.host())
    expected = canary.clone()
    for group, block, chunk, within in move.places(per_chunk):
        for tensor in GROUPS[group]:
            expected[chunk, place_of(tensor, within, per_chunk)] = pool[tensor][block]
    assert torch.equal(side.rows(), expected)
    assert all(torch.equal(now, before) for now, before in zip(side.pool, pool, strict=True))


@pytest.mark.parametrize("per_chunk", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_a_load_brings_back_what_was_stored_and_touches_no_other_block(maker: Maker, per_chunk: int, seed: int) -> None:
    side, rng = maker.side(per_chunk), random.Random(seed)
    stored = plan(rng, per_chunk)
    side.worker.submit_store(1, stored.gpu(), stored.host())
    before = [tensor.clone() for tensor in side.pool]
    free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    loaded = Plan([[free.pop() for _ in blocks] for blocks in stored.blocks], stored.indices, stored.chunks)
    side.worker.submit_load(2, loaded.host(), loaded.gpu())
    expected = [tensor.clone() for tensor in before]
    for group, blocks in enumerate(loaded.blocks):
        for to, origin in zip(blocks, stored.blocks[group], strict=True):
            for tensor in GROUPS[group]:
                expected[tensor][to] = before[tensor][origin]
    assert all(torch.equal(now, then) for now, then in zip(side.pool, expected, strict=True))


def test_the_middle_of_what_was_stored_can_be_loaded_alone(maker: Maker) -> None:
    side = maker.side(3)
    stored = Plan([list(range(9)), [], []], [3, 0, 0], [[20, 21, 22], [], []])
    side.worker.submit_store(1, stored.gpu(), stored.host())
    # Blocks 4 to 9 of the sequence: two of the first chunk, all of the second, one of the third.
    loaded = Plan([[30, 31, 32, 33, 34, 35], [], []], [4, 0, 0], [[20, 21, 22], [], []])
    side.worker.submit_load(2, loaded.host(), loaded.gpu())
    for tensor in GROUPS[0]:
        assert torch.equal(side.pool[tensor][30:36], side.pool[tensor][1:7])


def test_a_group_with_nothing_to_move_is_passed_over(maker: Maker) -> None:
    side, move = maker.side(3), plan(random.Random(3), 3, (0, 4, 0))
    side.rows().zero_()
    side.worker.submit_store(1, move.gpu(), move.host())
    touched = {int(chunk) for chunk in side.rows().any(dim=1).nonzero().flatten()}
    assert touched == {*chain(*move.chunks)}


def test_ranks_share_a_region_and_keep_to_their_own_part_of_it(maker: Maker) -> None:
    first, second = maker.side(3, rank=0, num_ranks=2), maker.side(3, rank=1, num_ranks=2)
    first.rows().zero_()
    move = plan(random.Random(1), 3)
    second.worker.submit_store(1, move.gpu(), move.host())
    cell = sum(PAGES) * 3
    assert not first.rows()[:, :cell].any()
    assert first.rows()[:, cell : 2 * cell].any()
    first.worker.submit_store(2, move.gpu(), move.host())
    for group, block, chunk, within in move.places(3):
        for tensor in GROUPS[group]:
            for rank, side in enumerate((first, second)):
                own = place_of(tensor, within, 3)
                row = first.rows()[chunk, rank * cell : (rank + 1) * cell]
                assert torch.equal(row[own], side.pool[tensor][block])


def test_jobs_are_done_when_they_are_submitted_and_told_once(maker: Maker) -> None:
    side, move = maker.side(1), plan(random.Random(0), 1)
    num_bytes = sum(len(blocks) * PAGES[t] for group, blocks in zip(GROUPS, move.blocks, strict=True) for t in group)
    side.worker.submit_store(5, move.gpu(), move.host())
    side.worker.submit_load(6, move.host(), move.gpu())
    side.worker.wait({5, 6})
    results: Any = side.worker.get_finished()
    assert [(r.job_id, r.success, r.transfer_size) for r in results] == [(5, True, num_bytes), (6, True, num_bytes)]
    assert all(r.transfer_time > 0.0 for r in results)
    assert side.worker.get_finished() == []


def test_a_job_is_told_when_its_bytes_are_there_and_not_before(maker: Maker) -> None:
    stores, loads = ManualLane(), ManualLane()
    side = maker.side(3, courier=Courier(torch.device("cpu"), (stores, loads)))
    move, other = plan(random.Random(0), 3), plan(random.Random(1), 3)
    side.rows().zero_()
    side.worker.submit_store(1, move.gpu(), move.host())
    side.worker.submit_store(2, other.gpu(), other.host())
    side.worker.submit_load(3, move.host(), move.gpu())
    assert side.worker.get_finished() == []
    assert not side.rows().any()
    stores.advance()
    assert side.rows().any()
    assert [r.job_id for r in side.worker.get_finished()] == [1]
    loads.advance()
    assert [(r.job_id, r.transfer_time) for r in side.worker.get_finished()] == [(3, 0.25)]
    stores.advance()
    assert [r.job_id for r in side.worker.get_finished()] == [2]


def test_a_wait_ends_with_the_jobs_named_and_leaves_later_ones_under_way(maker: Maker) -> None:
    stores, loads = ManualLane(), ManualLane()
    side = maker.side(1, courier=Courier(torch.device("cpu"), (stores, loads)))
    for job_id in (1, 2, 3):
        move = plan(random.Random(job_id), 1)
        side.worker.submit_store(job_id, move.gpu(), move.host())
    side.worker.submit_load(4, move.host(), move.gpu())
    side.worker.wait({2, 77})
    assert len(stores.waiting) == len(loads.waiting) == 1
    assert [r.job_id for r in side.worker.get_finished()] == [1, 2]


def test_shutdown_waits_for_what_is_under_way_before_it_lets_go_of_memory(maker: Maker) -> None:
    stores, loads = ManualLane(), ManualLane()
    side = maker.side(1, courier=Courier(torch.device("cpu"), (stores, loads)))
    move = plan(random.Random(2), 1)
    side.worker.submit_store(1, move.gpu(), move.host())
    side.worker.submit_load(2, move.host(), move.gpu())
    side.worker.shutdown()
    assert not stores.waiting
    assert not loads.waiting
    side.worker.shutdown()

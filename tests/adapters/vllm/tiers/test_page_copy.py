"""Pages there and back: real tensors, a real region in /dev/shm, and nothing else is touched.

`test_page_copy_kernels` runs all of it again with Triton's interpreter.
"""

import os
import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor, GPULoadStoreSpec
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from impala_vllm.adapters.vllm.tiers import page_copy
from impala_vllm.adapters.vllm.tiers.page_copy import LayoutError, PageCopyWorker
from impala_vllm.ops import Courier, courier, most_demoted_bytes, naive
from impala_vllm.ops.lane import AtOnce, End
from tests.ops.lanes import ManualLane

NUM_BLOCKS, NUM_CHUNKS = 40, 30
PAGES = (48, 32, 64)
"""Bytes of a block in each tensor."""
GROUPS = ((0, 1), (2,), (1, 2))
"""Tensors that each KV cache group has layers in; groups may overlay each other."""
LENGTHS = (6, 9, 5)
"""Blocks of each group in a transfer."""


@dataclass
class Side:
    """A worker with a pool of its own, on a region that may be shared."""

    pool: list[torch.Tensor]
    """As int8: [num_blocks, page_bytes]."""
    region: SharedOffloadRegion
    worker: PageCopyWorker

    def rows(self) -> torch.Tensor:
        return self.region.base_tensor.view(self.region.num_chunks, -1)


class Maker:
    """Makes regions under a name of its own, and takes them away."""

    def __init__(self) -> None:
        self.engine_id = f"test-{uuid.uuid4()}"
        self._sides: list[Side] = []

    def side(self, per_chunk: int, rank: int = 0, num_ranks: int = 1, courier: Courier | None = None) -> Side:
        cell = sum(PAGES) * per_chunk
        row = -(-cell * num_ranks // os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PAGE_SIZE")
        region = SharedOffloadRegion(self.engine_id, NUM_CHUNKS, rank, row, cell)
        generator = torch.Generator().manual_seed(rank)
        dtypes = (torch.bfloat16, torch.int8, torch.float32)
        pool: list[torch.Tensor] = []
        tensors: list[CanonicalKVCacheTensor] = []
        for page, dtype in zip(PAGES, dtypes, strict=True):
            whole = torch.randint(-128, 128, (NUM_BLOCKS, page), dtype=torch.int8, generator=generator)
            pool.append(whole)
            tensors.append(CanonicalKVCacheTensor(whole.view(dtype), page))
        refs = [[CanonicalKVCacheRef(tensor, PAGES[tensor]) for tensor in group] for group in GROUPS]
        room = page_copy.of_region(CanonicalKVCaches(tensors, refs), region, per_chunk)
        side = Side(pool, region, PageCopyWorker(room, region.cleanup, courier))
        self._sides.append(side)
        return side

    def close(self) -> None:
        for side in self._sides:
            side.worker.shutdown()


@pytest.fixture
def maker() -> Iterator[Maker]:
    made = Maker()
    yield made
    made.close()
    assert not os.path.exists(f"/dev/shm/vllm_offload_{made.engine_id}.mmap")


@dataclass(frozen=True)
class Plan:
    """A transfer: each group's blocks, where in its sequence they begin, and the chunks they lie in."""

    blocks: list[list[int]]
    indices: list[int]
    chunks: list[list[int]]

    def gpu(self) -> GPULoadStoreSpec:
        return GPULoadStoreSpec([*chain(*self.blocks)], [len(b) for b in self.blocks], self.indices)

    def host(self) -> CPULoadStoreSpec:
        return CPULoadStoreSpec([*chain(*self.chunks)])

    def places(self, per_chunk: int) -> Iterator[tuple[int, int, int, int]]:
        """Group, block, chunk and place in the chunk of everything that moves, told one by one."""
        for group, blocks in enumerate(self.blocks):
            for number, block in enumerate(blocks):
                place = self.indices[group] % per_chunk + number
                yield group, block, self.chunks[group][place // per_chunk], place % per_chunk


def plan(rng: random.Random, per_chunk: int, lengths: tuple[int, ...] = LENGTHS) -> Plan:
    blocks, chunks = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS), rng.sample(range(NUM_CHUNKS), NUM_CHUNKS)
    indices = [rng.randrange(10) if length else 0 for length in lengths]
    needed = [-(-(i % per_chunk + n) // per_chunk) if n else 0 for i, n in zip(indices, lengths, strict=True)]
    return Plan(
        [[blocks.pop() for _ in range(n)] for n in lengths], indices, [[chunks.pop() for _ in range(n)] for n in needed]
    )


def place_of(tensor: int, within: int, per_chunk: int) -> slice:
    """Where in a chunk's row a block's page of a tensor lies: tensor after tensor, block after block."""
    start = sum(PAGES[:tensor]) * per_chunk + within * PAGES[tensor]
    return slice(start, start + PAGES[tensor])


class CountingLane(AtOnce):
    num_run = 0

    def run(self, launch: Callable[[], None]) -> End:
        self.num_run += 1
        return super().run(launch)


def prove(side: Side) -> None:
    assert side.worker._room is not None
    page_copy.prove(side.worker._room, side.worker._courier)


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


def test_blocks_are_as_they_were_after_the_proof(maker: Maker) -> None:
    side = maker.side(3)
    before = [tensor.clone() for tensor in side.pool]
    prove(side)
    assert all(torch.equal(now, then) for now, then in zip(side.pool, before, strict=True))


def test_a_pool_that_loses_bytes_does_not_pass_the_proof(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    side = maker.side(3)
    monkeypatch.setattr(courier.dispatch, "swap_pages", lambda *_: None)
    with pytest.raises(LayoutError, match="other bytes by kernel"):
        prove(side)


def test_the_proof_goes_by_the_lanes_that_blocks_will_take(maker: Maker) -> None:
    stores, loads = CountingLane(), CountingLane()
    side = maker.side(3, courier=Courier(torch.device("cpu"), (stores, loads)))
    prove(side)
    assert (stores.num_run, loads.num_run) == (len(GROUPS), len(GROUPS))


def test_the_engines_are_proven_too_and_by_bytes_of_their_own(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    side = maker.side(3)
    before = [tensor.clone() for tensor in side.pool]
    orders: list[bool] = []

    def copies(sources: Any, targets: Any, sizes: Any, any_order: bool) -> None:
        orders.append(any_order)
        naive.copy_ranges(sources, targets, sizes)

    monkeypatch.setattr(courier, "_batched_dma", lambda device: copies)
    monkeypatch.setattr(courier.dispatch, "has_triton", lambda device: True)
    monkeypatch.setattr(courier.dispatch, "swap_pages", naive.swap_pages)
    prove(side)
    assert orders == [False, True] * len(GROUPS)
    assert all(torch.equal(now, then) for now, then in zip(side.pool, before, strict=True))
    monkeypatch.setattr(courier, "_batched_dma", lambda device: lambda *_: None)
    side.rows().zero_()
    with pytest.raises(LayoutError, match="other bytes by dma"):
        prove(side)


def test_pages_that_a_kernel_could_not_address_are_refused(maker: Maker) -> None:
    side = maker.side(1)
    odd = torch.zeros(4, 12, dtype=torch.int8)
    with pytest.raises(LayoutError, match="multiples of 8"):
        page_copy.of_tensors([odd], [side.rows()[:, :12]], [[CanonicalKVCacheRef(0, 12)]], 1)


@pytest.mark.parametrize("per_chunk", [1, 3])
def test_demoted_blocks_take_half_the_room_and_come_back_within_fp8s_error(per_chunk: int) -> None:
    page, num_layers, num_blocks = 4096, 3, 12
    run_bytes = most_demoted_bytes(num_layers * page, num_layers)
    assert run_bytes < 0.51 * num_layers * page
    row = -(-run_bytes * per_chunk // 4096) * 4096
    region = SharedOffloadRegion(f"test-{uuid.uuid4()}", 6, 0, row, run_bytes * per_chunk)
    generator = torch.Generator().manual_seed(1)
    pool = [torch.randn(num_blocks, page // 2, generator=generator).to(torch.bfloat16) for _ in range(num_layers)]
    tensors = [CanonicalKVCacheTensor(layer.view(torch.int8), page) for layer in pool]
    refs = [CanonicalKVCacheRef(i, page) for i in range(num_layers)]
    room = page_copy.of_runs(CanonicalKVCaches(tensors, [refs]), region, per_chunk, run_bytes)
    worker = PageCopyWorker(room, region.cleanup)
    before = [layer.clone() for layer in pool]
    page_copy.prove(room, worker._courier)
    chunks = [4, 2, 5, 0, 1][: -(-5 // per_chunk)]
    origin, to = [7, 1, 9, 3, 0], [2, 4, 5, 6, 8]
    worker.submit_store(1, GPULoadStoreSpec(origin, [5], [0]), CPULoadStoreSpec(chunks))
    worker.submit_load(2, CPULoadStoreSpec(chunks), GPULoadStoreSpec(to, [5], [0]))
    moved = sum(r.transfer_size or 0 for r in worker.get_finished())
    assert moved < 0.51 * 2 * 5 * num_layers * page
    for layer, old in zip(pool, before, strict=True):
        wanted = old[origin].float()
        assert torch.allclose(layer[to].float(), wanted, rtol=1 / 16, atol=2.0**-16)
        assert not torch.equal(layer[to].float(), wanted)
        untouched = [i for i in range(num_blocks) if i not in to]
        assert torch.equal(layer[untouched], old[untouched])
    worker.shutdown()
    assert not os.path.exists(region.mmap_path)


def test_demotion_is_for_one_group() -> None:
    tensors = [CanonicalKVCacheTensor(torch.zeros(2, 64, dtype=torch.int8), 64)]
    refs = [CanonicalKVCacheRef(0, 64)]
    with pytest.raises(LayoutError, match="several"):
        page_copy.of_runs(CanonicalKVCaches(tensors, [refs, refs]), None, 1, 64)  # pyright: ignore[reportArgumentType]

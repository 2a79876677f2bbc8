"""What the proof before the first transfer finds, and what it leaves as it was; demoted blocks pass it too.

`test_page_copy_kernels` runs all of it again with Triton's interpreter.
"""

import os
import uuid
from collections.abc import Callable
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
from tests.adapters.vllm.tiers.sides import GROUPS, Maker, Side


class CountingLane(AtOnce):
    num_run = 0

    def run(self, launch: Callable[[], None]) -> End:
        self.num_run += 1
        return super().run(launch)


def prove(side: Side) -> None:
    assert side.worker._room is not None
    page_copy.prove(side.worker._room, side.worker._courier)


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

"""The movers that a GPU run compares, on memory of the host; copies by address stand in for the driver's batch."""

from typing import Any

import pytest
import torch

from benchmarks.gpu import device
from benchmarks.gpu.movers import Pages
from impala_vllm.ops import naive

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _rehearsal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IMPALA_GPU_REHEARSAL", "1")


@pytest.mark.parametrize("direction", ["H2D", "D2H"])
@pytest.mark.parametrize("name", ["impala", "courier", "impala_ranges", "torch_copies"])
def test_a_mover_brings_every_page_to_its_place(direction: str, name: str):
    batch = Pages.of(1 << 16, CPU).batch(direction, 2048, 20)
    wanted = batch.source[batch.source_ids].clone()
    getattr(batch, name)()()
    assert torch.equal(batch.target[batch.target_ids], wanted)
    assert batch.is_right(getattr(batch, name)())


def test_a_mover_that_loses_pages_or_mixes_them_up_is_not_right():
    batch = Pages.of(1 << 16, CPU).batch("H2D", 2048, 8)
    assert not batch.is_right(lambda: None)

    def shifted() -> None:
        batch.target[batch.target_ids] = batch.source[batch.source_ids.roll(1)]

    assert not batch.is_right(shifted)


def test_vllms_dma_is_told_that_loads_may_be_read_in_any_order_and_stores_may_not(monkeypatch: pytest.MonkeyPatch):
    custom_ops: Any = pytest.importorskip("vllm._custom_ops")
    orders: list[bool] = []

    def copies(sources: Any, targets: Any, sizes: Any, is_src_access_order_any: bool = False) -> None:
        orders.append(is_src_access_order_any)
        naive.copy_ranges(sources, targets, sizes)

    monkeypatch.setattr(custom_ops, "swap_blocks_batch", copies)
    for direction in ("H2D", "D2H"):
        batch = Pages.of(1 << 16, CPU).batch(direction, 2048, 8)
        assert batch.is_right(batch.vllm_dma())
    assert orders == [True, False]


def test_vllms_dma_is_not_timed_on_a_stream_that_the_driver_batches_nothing_on(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("vllm")
    monkeypatch.setattr(device, "takes_batched_copies", lambda place: False)
    batch = Pages.of(1 << 16, CPU).batch("H2D", 2048, 8)
    for move in (batch.vllm_dma(), batch.vllm_triton()):
        with pytest.raises(RuntimeError, match="default stream"):
            move()

"""What of the courier can be told without a GPU: which bytes it carries, and by which way it would."""

import pytest
import torch

from impala_vllm.ops import Batch, Courier, PageTable, Pool, Way, courier, naive, ways
from tests.ops.lanes import ManualLane
from tests.ops.memory import layers, packed, some_ids

KIB = 1 << 10


def test_a_load_brings_back_what_a_store_took_and_touches_nothing_else() -> None:
    _, pool = packed(8, [64, 24], seed=1)
    host_slab, tier = layers(8, [64, 24], gap_bytes=8, seed=2)
    carry = Courier(torch.device("cpu"))
    hbm_ids, host_ids = some_ids(5, 8, seed=3), some_ids(5, 8, seed=4)
    batch = Batch(Pool(PageTable.of(pool), PageTable.of(tier)), hbm_ids, host_ids)
    before = [page.clone() for page in pool]
    canaries = host_slab.clone()
    stored = carry.store([batch])
    assert stored.end.is_done()
    assert stored.num_bytes == 5 * 88
    for page in pool:
        page[hbm_ids] = 0
    carry.load([batch]).end.wait()
    assert all(torch.equal(a, b) for a, b in zip(pool, before, strict=True))
    others = torch.tensor([i for i in range(8) if i not in host_ids.tolist()])
    assert torch.equal(host_slab[1:-1][others], canaries[1:-1][others])


def test_each_direction_has_a_lane_and_keeps_its_order() -> None:
    (page,), (room,) = packed(4, [16], seed=1)[1], packed(4, [16], seed=2)[1]
    pool = Pool(PageTable.of([page]), PageTable.of([room]))
    stores, loads = ManualLane(), ManualLane()
    carry = Courier(torch.device("cpu"), (stores, loads))
    first, second, third = (torch.tensor([i]) for i in (0, 1, 2))
    before = page.clone()
    old = room[3].clone()
    tickets = [carry.store([Batch(pool, first, third)]), carry.store([Batch(pool, second, third)])]
    load = carry.load([Batch(pool, first, torch.tensor([3]))])
    loads.advance()
    assert load.end.is_done()
    assert torch.equal(page[0], old)
    stores.advance()
    assert [t.end.is_done() for t in tickets] == [True, False]
    stores.advance()
    assert torch.equal(room[2], before[1]), "the store that was asked for last has the last word"


def test_tables_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="same page sizes"):
        Pool(PageTable.of(packed(2, [16], seed=1)[1]), PageTable.of(packed(2, [24], seed=1)[1]))
    with pytest.raises(ValueError, match="do not hold a run"):
        Pool(PageTable.of(packed(2, [4096], seed=1)[1]), PageTable.of(packed(2, [2048], seed=1)[1]), is_demoted=True)


@pytest.mark.parametrize(
    ("page_bytes", "num_pages", "is_store", "wanted"),
    [
        ((16 * KIB,), 1000, False, False),
        ((64 * KIB,), 1000, False, True),
        ((16 * KIB,), 1000, True, True),
        ((16 * KIB,), 15, False, True),
        ((16 * KIB,) * 2, 15, False, False),
        ((64 * KIB,) * 36, 900, False, True),
        ((64 * KIB,) * 36, 7400, False, False),
        ((64 * KIB,) * 36, 7400, True, False),
    ],
)
def test_large_pages_few_pages_and_stores_go_by_dma_up_to_so_many_descriptors(
    page_bytes: tuple[int, ...], num_pages: int, is_store: bool, wanted: bool
) -> None:
    assert courier.takes_dma(page_bytes, num_pages, is_store=is_store) is wanted


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Descriptors and order of each batch that the driver was given; torch stands in for it, and for the kernels."""
    made: list[tuple[int, bool]] = []

    def copies(sources: torch.Tensor, targets: torch.Tensor, sizes: torch.Tensor, any_order: bool) -> None:
        made.append((len(sources), any_order))
        naive.copy_ranges(sources, targets, sizes)

    monkeypatch.setattr(courier, "_batched_dma", lambda device: copies)
    monkeypatch.setattr(courier.dispatch, "has_triton", lambda device: True)
    monkeypatch.setattr(courier.dispatch, "swap_pages", naive.swap_pages)
    return made


def test_descriptors_go_to_the_driver_in_slices_and_every_page_arrives(
    calls: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier.tuning, "DMA_DESCRIPTORS", 7)
    pool, tier = packed(20, [64, 24], seed=1)[1], layers(20, [64, 24], gap_bytes=8, seed=2)[1]
    batch = Batch(Pool(PageTable.of(pool), PageTable.of(tier)), some_ids(11, 20, seed=3), some_ids(11, 20, seed=4))
    carry = Courier(torch.device("cpu"))
    carry.store([batch])
    # Three pages of two layers at a time, in order of the stream: the model may write them next.
    assert calls == [(6, False)] * 3 + [(4, False)]
    assert all(torch.equal(t[batch.host_ids], p[batch.hbm_ids]) for p, t in zip(pool, tier, strict=True))
    before = [page.clone() for page in pool]
    for page in pool:
        page[batch.hbm_ids] = 0
    carry.load([batch], Way.DMA)
    assert calls[4:] == [(6, True)] * 3 + [(4, True)]
    assert all(torch.equal(a, b) for a, b in zip(pool, before, strict=True))


def test_a_batch_of_more_descriptors_than_the_engines_thread_can_spare_goes_by_kernel(
    calls: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier.tuning, "DMA_UP_TO_DESCRIPTORS", 10)
    page, room = packed(20, [64, 64], seed=1)[1], packed(20, [64, 64], seed=2)[1]
    pool, carry = Pool(PageTable.of(page), PageTable.of(room)), Courier(torch.device("cpu"))
    carry.store([Batch(pool, torch.arange(5), torch.arange(5))])
    assert calls == [(10, False)]
    carry.store([Batch(pool, torch.arange(6), torch.arange(6))])
    assert calls == [(10, False)]
    assert torch.equal(room[0][:6], page[0][:6])


def test_a_way_can_be_asked_for_where_it_is_there(calls: list[tuple[int, bool]]) -> None:
    page, room = packed(4, [64], seed=1)[1], packed(4, [64], seed=2)[1]
    batch = Batch(Pool(PageTable.of(page), PageTable.of(room)), torch.arange(4), torch.arange(4))
    carry = Courier(torch.device("cpu"))
    assert ways(batch.pool) == (Way.DMA, Way.KERNEL)
    carry.store([batch], Way.KERNEL)
    assert calls == []
    carry.load([batch], Way.DMA)
    assert calls == [(4, True)]


def test_where_nothing_batches_copies_there_is_one_way() -> None:
    page, room = packed(4, [64], seed=1)[1], packed(4, [64], seed=2)[1]
    batch = Batch(Pool(PageTable.of(page), PageTable.of(room)), torch.arange(4), torch.arange(4))
    assert ways(batch.pool) == (Way.KERNEL,)
    with pytest.raises(ValueError, match="no dma"):
        Courier(torch.device("cpu")).store([batch], Way.DMA)


def test_ranges_are_the_pages_of_each_layer_in_turn() -> None:
    _, pool = layers(4, [16, 8], gap_bytes=8, seed=1)
    _, tier = packed(4, [16, 8], seed=2)
    at, to = torch.tensor([2, 0]), torch.tensor([1, 3])
    sources, targets, sizes = courier._ranges(PageTable.of(pool), at, PageTable.of(tier), to)
    assert sources.tolist() == [pool[layer][i].data_ptr() for layer in (0, 1) for i in (2, 0)]
    assert targets.tolist() == [tier[layer][i].data_ptr() for layer in (0, 1) for i in (1, 3)]
    assert sizes.tolist() == [16, 16, 8, 8]

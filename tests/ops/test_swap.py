"""The kernels of `swap` against `naive`, in memory where any stray byte shows."""

from dataclasses import replace

import pytest
import torch

from impala_vllm.ops import PageTable, naive, swap
from tests.ops.memory import layers, packed, random_bytes, some_ids


# Odd numbers of words, less than a chunk, more than one, several chunks.
@pytest.mark.parametrize(
    ("num_blocks", "page_bytes", "strided"),
    [
        (1, [8], False),
        (1, [8], True),
        (63, [8, 8, 8], True),
        (63, [8200, 24], False),
        (63, [8200, 24], True),
        (9, [65536], True),
        (1, [65536, 65536], False),
        (1000, [8], False),
        (1000, [1000], True),
    ],
)
def test_swap_moves_each_page_and_nothing_else(num_blocks: int, page_bytes: list[int], strided: bool) -> None:
    num_pages = num_blocks + 5
    _, sources = (
        layers(num_pages, page_bytes, gap_bytes=24, seed=1) if strided else packed(num_pages, page_bytes, seed=1)
    )
    slab, destinations = (
        packed(num_pages, page_bytes, seed=2) if strided else layers(num_pages, page_bytes, gap_bytes=8, seed=2)
    )
    wanted = slab.clone()
    source_ids, destination_ids = some_ids(num_blocks, num_pages, seed=3), some_ids(num_blocks, num_pages, seed=4)
    source, destination = PageTable.of(sources), PageTable.of(destinations)

    naive.swap_pages(source, source_ids, destination, destination_ids)
    by_naive = slab.clone()
    slab.copy_(wanted)
    swap.swap_pages(source, source_ids, destination, destination_ids)

    assert torch.equal(slab, by_naive)
    assert not torch.equal(slab, wanted)


@pytest.mark.parametrize(("num_rows", "per_row", "page_bytes"), [(1, 1, [8]), (9, 7, [8200, 24]), (125, 8, [64])])
def test_pages_lie_in_rows_where_layers_say_so(num_rows: int, per_row: int, page_bytes: list[int]) -> None:
    slab, rows = layers(num_rows, [per_row * size for size in page_bytes], gap_bytes=8, seed=1)
    tier = PageTable.of([row.unflatten(1, (per_row, -1)) for row in rows])
    _, pool = packed(num_rows * per_row + 2, page_bytes, seed=2)
    table = PageTable.of(pool)
    count = max(1, num_rows * per_row - 3)
    at, to = some_ids(count, num_rows * per_row + 2, seed=3), some_ids(count, num_rows * per_row, seed=4)
    canaries = slab.clone()
    naive.swap_pages(table, at, tier, to)
    wanted = slab.clone()
    slab.copy_(canaries)
    swap.swap_pages(table, at, tier, to)
    assert torch.equal(slab, wanted)
    for layer, size in enumerate(page_bytes):
        for i, j in zip(at.tolist(), to.tolist(), strict=True):
            place = (j % per_row) * size
            assert torch.equal(rows[layer][j // per_row, place : place + size], pool[layer][i])
    assert tier.addresses_of(to).tolist() == [
        [row.data_ptr() + j // per_row * row.stride(0) + j % per_row * size for j in to.tolist()]
        for row, size in zip(rows, page_bytes, strict=True)
    ]
    zeros = torch.zeros_like(pool[0])
    back = PageTable.of([zeros, *(torch.zeros_like(p) for p in pool[1:])])
    swap.swap_pages(tier, to, back, at)
    assert torch.equal(zeros[at], pool[0][at])


@pytest.mark.parametrize(("num_blocks", "page_bytes"), [(1, [8]), (63, [8200, 24]), (1000, [8]), (9, [65536])])
def test_scatter_undoes_gather(num_blocks: int, page_bytes: list[int]) -> None:
    slab, pages = layers(num_blocks, page_bytes, gap_bytes=8, seed=1)
    staged_slab, staged = packed(num_blocks, page_bytes, seed=2)
    table, staging = PageTable.of(pages), PageTable.of(staged)
    ids = some_ids(num_blocks, num_blocks, seed=3)
    before, canaries = slab.clone(), staged_slab.clone()

    swap.gather_pages(table, ids, staging)
    for page, copy in zip(pages, staged, strict=True):
        assert torch.equal(copy, page[ids])
        page.zero_()
    swap.scatter_pages(staging, table, ids)
    assert torch.equal(slab, before)

    for page, copy in zip(packed(num_blocks, page_bytes, seed=2)[1], staged, strict=True):
        copy.copy_(page)
    assert torch.equal(staged_slab, canaries)


@pytest.mark.parametrize("num_ranges", [1, 63, 1000])
def test_copy_ranges_copies_ranges_of_all_sizes(num_ranges: int) -> None:
    generator = torch.Generator().manual_seed(num_ranges)
    words = torch.randint(0, 12, (num_ranges,), generator=generator)
    words[0] = 8192  # one of 64 KiB among the small ones
    # Each range is followed by one word that stays as it was.
    starts = torch.cumsum(words + 1, 0) - (words + 1)
    total = int((words + 1).sum()) * 8
    source, destination = random_bytes(1, total, seed=1)[0], random_bytes(1, total, seed=2)[0]
    order = some_ids(num_ranges, num_ranges, seed=3)
    sources, destinations = source.data_ptr() + starts * 8, destination.data_ptr() + starts * 8
    before = destination.clone()

    naive.copy_ranges(sources[order], destinations[order], words[order] * 8)
    by_naive = destination.clone()
    destination.copy_(before)
    swap.copy_ranges(sources[order], destinations[order], words[order] * 8, sources.device)

    assert torch.equal(destination, by_naive)
    assert torch.equal(destination[-8:], before[-8:])


def test_nothing_to_copy_changes_nothing() -> None:
    none = torch.empty(0, dtype=torch.int64)
    slab, pages = layers(3, [16, 8], gap_bytes=8, seed=1)
    before = slab.clone()
    table = PageTable.of(pages)
    swap.copy_ranges(none, none, none, none.device)
    swap.swap_pages(table, none, table, none)
    swap.gather_pages(table, none, table)
    swap.scatter_pages(table, table, none)
    assert torch.equal(slab, before)


def test_addresses_past_four_gigabytes_of_pages_do_not_wrap() -> None:
    # The strides are counted, never touched: page 3 of a stride of 2^31 bytes lies where its address says.
    _, pages = layers(1, [64], gap_bytes=8, seed=1)
    _, copies = layers(1, [64], gap_bytes=8, seed=2)
    stride = 1 << 31
    far = PageTable.of(pages)
    far = replace(far, addresses=far.addresses - 3 * stride, row_strides=torch.tensor([stride]))
    swap.gather_pages(far, torch.tensor([3]), PageTable.of(copies))
    assert torch.equal(copies[0], pages[0])


def test_what_does_not_fit_is_refused() -> None:
    table = PageTable.of(packed(4, [16], seed=1)[1])
    other = PageTable.of(packed(4, [24], seed=1)[1])
    ids = torch.arange(2)
    with pytest.raises(ValueError, match="do not fit"):
        swap.swap_pages(table, ids, other, ids)
    with pytest.raises(ValueError, match="2 pages do not go to 3 places"):
        swap.swap_pages(table, ids, table, torch.arange(3))
    with pytest.raises(ValueError, match="multiples of 8"):
        PageTable.of([torch.zeros(4, 12, dtype=torch.uint8)])

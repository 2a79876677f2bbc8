"""The kernels of `fp8` against `naive`, to the bit, on every value that bfloat16 has."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from impala_vllm.ops import PageTable, fp8, naive
from tests.ops.memory import CANARY, layers, packed, random_bytes, some_ids


def _fill(pages: list[Tensor], seed: int) -> None:
    """bfloat16 of all sizes, a group of zeros and one with an infinity among them."""
    generator = torch.Generator().manual_seed(seed)
    for page in pages:
        shape = (page.shape[0], page.shape[1] // 2)
        sizes = torch.randint(-40, 40, (shape[0], 1), generator=generator)
        values = torch.ldexp(torch.randn(shape, generator=generator), sizes)
        values[0] = 0.0
        values[-1, -1] = float("inf")
        page.copy_(values.to(torch.bfloat16).view(torch.uint8))


@pytest.mark.parametrize(
    ("num_blocks", "page_bytes", "strided"),
    [
        (1, [8], False),
        (1, [64], True),
        (9, [8200, 24], True),
        (9, [8200, 24], False),
        (63, [2048, 8], True),
        (1000, [8], False),
        (1, [65536], True),
    ],
)
def test_demote_and_promote_are_naives_to_the_bit(num_blocks: int, page_bytes: list[int], strided: bool) -> None:
    num_pages = num_blocks + 3
    make = layers if strided else packed
    slab, pages = make(num_pages, page_bytes, **({"gap_bytes": 8} if strided else {}), seed=1)
    _fill(pages, seed=2)
    table = PageTable.of(pages)
    ids, run_ids = some_ids(num_blocks, num_pages, seed=3), some_ids(num_blocks, num_blocks + 2, seed=5)
    # A little more room than a run takes, as a host tier has.
    run_slab, (run,) = layers(num_blocks + 2, [naive.demoted_bytes(table) + 8], gap_bytes=16, seed=4)
    runs = PageTable.of([run])
    canaries = run_slab.clone()
    naive.demote_pages(table, ids, runs, run_ids)
    wanted = run_slab.clone()
    run_slab.copy_(canaries)

    fp8.demote_pages(table, ids, runs, run_ids)

    assert torch.equal(run_slab, wanted)

    before = slab.clone()
    naive.promote_pages(runs, run_ids, table, ids)
    wanted = slab.clone()
    slab.copy_(before)
    fp8.promote_pages(runs, run_ids, table, ids)
    assert torch.equal(slab, wanted)


def test_every_finite_bfloat16_is_coded_as_torch_codes_it() -> None:
    everything = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = everything.view(torch.bfloat16)
    values = values[values.isfinite()].float()
    # One group for each exponent: every rounding happens, those to zero included.
    values = values[values.abs().argsort()]
    values = torch.nn.functional.pad(values, (0, -len(values) % naive.GROUP))
    page = values.to(torch.bfloat16).view(1, -1).view(torch.uint8).contiguous()
    table, one = PageTable.of([page]), torch.tensor([0])
    runs = [torch.full((1, naive.demoted_bytes(table)), CANARY, dtype=torch.uint8) for _ in range(2)]
    naive.demote_pages(table, one, PageTable.of([runs[0]]), one)
    fp8.demote_pages(table, one, PageTable.of([runs[1]]), one)
    assert torch.equal(*runs)


def test_pages_and_runs_past_four_gigabytes_do_not_wrap() -> None:
    # Strides are counted, never touched: page and run 3 of a stride of 2^31 bytes lie where their addresses say.
    def far(table: PageTable) -> PageTable:
        return replace(table, addresses=table.addresses - 3 * (1 << 31), row_strides=torch.tensor([1 << 31]))

    page, back = random_bytes(1, 64, seed=1) & 0x3F, torch.zeros(1, 64, dtype=torch.uint8)  # all finite
    table, three, one = PageTable.of([page]), torch.tensor([3]), torch.tensor([0])
    run, wanted = (torch.zeros(1, naive.demoted_bytes(table), dtype=torch.uint8) for _ in range(2))
    fp8.demote_pages(far(table), three, far(PageTable.of([run])), three)
    naive.demote_pages(table, one, PageTable.of([wanted]), one)
    assert torch.equal(run, wanted)
    fp8.promote_pages(far(PageTable.of([run])), three, far(PageTable.of([back])), three)
    naive.promote_pages(PageTable.of([run]), one, table, one)
    assert torch.equal(back, page)


def test_runs_that_are_too_small_or_too_few_are_refused() -> None:
    table = PageTable.of(packed(4, [16], seed=1)[1])
    two = torch.arange(2)
    with pytest.raises(ValueError, match="runs are one layer of 16 bytes"):
        fp8.demote_pages(table, two, PageTable.of([torch.zeros(2, 8, dtype=torch.uint8)]), two)
    runs = PageTable.of([torch.zeros(2, naive.demoted_bytes(table), dtype=torch.uint8)])
    with pytest.raises(ValueError, match="do not go with 3 runs"):
        fp8.promote_pages(runs, torch.arange(3), table, two)


def test_the_most_that_a_run_takes_is_enough_for_any_cut_of_the_bytes() -> None:
    for page, num_layers in ((8, 1), (2048, 3), (4104, 5), (65536, 36)):
        pages = [torch.zeros(2, page, dtype=torch.uint8)] * num_layers
        most = naive.most_demoted_bytes(page * num_layers, num_layers)
        assert naive.demoted_bytes(PageTable.of(pages)) <= most < 0.51 * page * num_layers + num_layers + 8
        assert naive.demoted_bytes(PageTable.of([torch.zeros(2, page * num_layers, dtype=torch.uint8)])) <= most


def test_an_empty_batch_changes_nothing() -> None:
    pages = random_bytes(2, 16, seed=1)
    table, before = PageTable.of([pages]), pages.clone()
    run = torch.full((1, naive.demoted_bytes(table)), CANARY, dtype=torch.uint8)
    none = torch.empty(0, dtype=torch.int64)
    fp8.demote_pages(table, none, PageTable.of([run]), none)
    fp8.promote_pages(PageTable.of([run]), none, table, none)
    assert (run == CANARY).all()
    assert torch.equal(pages, before)

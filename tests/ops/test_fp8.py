"""The kernels of `fp8` against `naive`, to the bit, on every value that bfloat16 has."""

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
    [(1, [8], False), (1, [64], True), (9, [8200, 24], True), (9, [8200, 24], False), (63, [2048, 8], True)],
)
def test_demote_and_promote_are_naives_to_the_bit(num_blocks: int, page_bytes: list[int], strided: bool) -> None:
    num_pages = num_blocks + 3
    make = layers if strided else packed
    slab, pages = make(num_pages, page_bytes, **({"gap_bytes": 8} if strided else {}), seed=1)
    _fill(pages, seed=2)
    table = PageTable.of(pages)
    ids = some_ids(num_blocks, num_pages, seed=3)
    run_slab, (run,) = layers(num_blocks, [naive.demoted_bytes(table)], gap_bytes=16, seed=4)
    canaries = run_slab.clone()
    naive.demote_pages(table, ids, run)
    wanted = run_slab.clone()
    run_slab.copy_(canaries)

    fp8.demote_pages(table, ids, run)

    assert torch.equal(run_slab, wanted)

    before = slab.clone()
    naive.promote_pages(run, table, ids)
    wanted = slab.clone()
    slab.copy_(before)
    fp8.promote_pages(run, table, ids)
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
    naive.demote_pages(table, one, runs[0])
    fp8.demote_pages(table, one, runs[1])
    assert torch.equal(*runs)


def test_runs_and_pages_of_other_sizes_are_refused() -> None:
    table = PageTable.of(packed(4, [16], seed=1)[1])
    with pytest.raises(ValueError, match="a run is uint8"):
        fp8.demote_pages(table, torch.arange(2), torch.zeros(2, 8, dtype=torch.uint8))
    run = torch.zeros(2, naive.demoted_bytes(table), dtype=torch.uint8)
    with pytest.raises(ValueError, match="does not hold 3"):
        fp8.promote_pages(run, table, torch.arange(3))


def test_an_empty_batch_changes_nothing() -> None:
    table = PageTable.of([random_bytes(2, 16, seed=1)])
    run = torch.full((1, naive.demoted_bytes(table)), CANARY, dtype=torch.uint8)
    fp8.demote_pages(table, torch.empty(0, dtype=torch.int64), run)
    assert (run == CANARY).all()

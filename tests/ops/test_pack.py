"""The kernels of `pack` against `naive`, checksums included."""

import pytest
import torch

from impala_vllm.ops import PageTable, naive, pack
from tests.ops.memory import CANARY, layers, packed, random_bytes, some_ids


@pytest.mark.parametrize(
    ("num_blocks", "page_bytes", "strided", "checked"),
    [
        (1, [8], False, True),
        (1, [8], True, False),
        (63, [8, 8, 8], True, True),
        (63, [8200, 24], True, True),
        (63, [8200, 24], False, False),
        (1000, [8], False, False),
        (1, [65536, 65536], False, True),
        (9, [65536], True, True),
    ],
)
def test_pack_and_unpack_are_naives_to_the_bit(
    num_blocks: int, page_bytes: list[int], strided: bool, checked: bool
) -> None:
    num_pages = num_blocks + 3
    make = layers if strided else packed
    slab, pages = make(num_pages, page_bytes, **({"gap_bytes": 8} if strided else {}), seed=1)
    table = PageTable.of(pages)
    ids = some_ids(num_blocks, num_pages, seed=2)
    run_slab, (run,) = layers(num_blocks, [table.run_bytes], gap_bytes=16 if strided else 0, seed=3)
    sums_and_canaries = torch.full((num_blocks + 2,), -1)
    sums = sums_and_canaries[1:-1] if checked else None
    wanted_run, wanted_sums = torch.empty_like(run), torch.empty(num_blocks, dtype=torch.int64)
    naive.pack_pages(table, ids, wanted_run, wanted_sums)
    canaries = run_slab.clone()

    pack.pack_pages(table, ids, run, sums)

    assert torch.equal(run, wanted_run)
    assert sums is None or torch.equal(sums, wanted_sums)

    run.copy_(random_bytes(num_blocks, table.run_bytes, seed=4))
    before = slab.clone()
    naive.unpack_pages(run, table, ids, wanted_sums)
    wanted_slab = slab.clone()
    slab.copy_(before)
    pack.unpack_pages(run, table, ids, sums)

    assert torch.equal(slab, wanted_slab)
    assert sums is None or torch.equal(sums, wanted_sums)
    assert sums_and_canaries[[0, -1]].tolist() == [-1, -1]
    run.copy_(layers(num_blocks, [table.run_bytes], gap_bytes=16 if strided else 0, seed=3)[1][0])
    assert torch.equal(run_slab, canaries)


def test_pages_that_lie_in_rows_are_packed_and_put_back() -> None:
    slab, rows = layers(3, [4 * 64, 4 * 24], gap_bytes=8, seed=1)
    table = PageTable.of([row.unflatten(1, (4, -1)) for row in rows])
    ids = some_ids(9, 12, seed=2)
    run, wanted = torch.zeros(9, 88, dtype=torch.uint8), torch.zeros(9, 88, dtype=torch.uint8)
    naive.pack_pages(table, ids, wanted)
    pack.pack_pages(table, ids, run)
    assert torch.equal(run, wanted)
    assert torch.equal(run[0, :64], rows[0][int(ids[0]) // 4].unflatten(0, (4, 64))[int(ids[0]) % 4])

    before, other = slab.clone(), random_bytes(9, 88, seed=3)
    naive.unpack_pages(other, table, ids)
    by_naive = slab.clone()
    slab.copy_(before)
    pack.unpack_pages(other, table, ids)
    assert torch.equal(slab, by_naive)


def test_a_run_longer_than_two_gigabytes_does_not_wrap() -> None:
    # Memory between the rows is never touched.
    stride = (1 << 30) + 8
    run = torch.empty(2 * stride + 24, dtype=torch.uint8).as_strided((3, 24), (stride, 1))
    _, pages = layers(3, [16, 8], gap_bytes=8, seed=1)
    ids, sums = torch.tensor([2, 0, 1]), torch.zeros(3, dtype=torch.int64)
    pack.pack_pages(PageTable.of(pages), ids, run, sums)
    wanted = torch.cat([page[ids] for page in pages], dim=1)
    assert torch.equal(run, wanted)
    assert torch.equal(sums, naive.checksum(wanted))
    back = [torch.zeros(3, page.shape[1], dtype=torch.uint8) for page in pages]
    pack.unpack_pages(run, PageTable.of(back), ids)
    assert all(torch.equal(a, b) for a, b in zip(back, pages, strict=True))


def test_an_empty_batch_changes_nothing() -> None:
    slab, pages = layers(2, [24], gap_bytes=8, seed=1)
    before = slab.clone()
    run = torch.full((2, 24), CANARY, dtype=torch.uint8)
    none = torch.empty(0, dtype=torch.int64)
    pack.pack_pages(PageTable.of(pages), none, run, torch.empty(0, dtype=torch.int64))
    pack.unpack_pages(run, PageTable.of(pages), none)
    assert torch.equal(slab, before)
    assert (run == CANARY).all()


def test_a_run_too_short_is_refused() -> None:
    table = PageTable.of(packed(4, [16], seed=1)[1])
    with pytest.raises(ValueError, match="does not hold 3 pages"):
        pack.pack_pages(table, torch.arange(3), torch.zeros(2, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="a run is uint8"):
        pack.pack_pages(table, torch.arange(1), torch.zeros(2, 24, dtype=torch.uint8))

"""The specification itself, against answers worked out without it."""

import torch

from impala_vllm.ops import PageTable, naive
from tests.ops.memory import random_bytes


def test_checksum_is_splitmix_summed_over_words() -> None:
    run = random_bytes(2, 5 * 8, seed=7)
    limit = 1 << 64

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % limit
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % limit
        return x ^ (x >> 31)

    for row, found in zip(run, naive.checksum(run).tolist(), strict=True):
        raw = bytes(row.tolist())
        words = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)]
        wanted = sum(mix((w + (i + 1) * 0x9E3779B97F4A7C15) % limit) for i, w in enumerate(words)) % limit
        assert found % limit == wanted


def test_checksum_sees_a_flipped_bit_and_swapped_words() -> None:
    run = random_bytes(1, 64, seed=1)
    flipped = run.clone()
    flipped[0, 63] ^= 1
    swapped = torch.cat([run[:, 8:16], run[:, :8], run[:, 16:]], dim=1)
    assert len({int(naive.checksum(r)) for r in (run, flipped, swapped)}) == 3


def test_pack_puts_a_page_of_each_layer_end_to_end() -> None:
    pages = [random_bytes(4, 16, seed=1), random_bytes(4, 8, seed=2)]
    run = torch.zeros(2, 24, dtype=torch.uint8)
    naive.pack_pages(PageTable.of(pages), torch.tensor([3, 1]), run)
    assert torch.equal(run[0], torch.cat([pages[0][3], pages[1][3]]))
    assert torch.equal(run[1], torch.cat([pages[0][1], pages[1][1]]))


def test_pages_of_any_dtype_are_bytes() -> None:
    cache = torch.arange(24, dtype=torch.float32).view(3, 8)
    copy = torch.zeros(3, 32, dtype=torch.uint8)
    naive.swap_pages(PageTable.of([cache]), torch.tensor([2]), PageTable.of([copy]), torch.tensor([0]))
    assert torch.equal(copy[0].view(torch.float32), cache[2])


def test_demotion_loses_a_sixteenth_of_a_value_at_most_and_halves_the_bytes() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(4, 4096, generator=generator).to(torch.bfloat16)
    table = PageTable.of([values])
    run = torch.zeros(4, naive.demoted_bytes(table), dtype=torch.uint8)
    assert run.shape[1] == 4096 + 8
    ids = torch.arange(4)
    naive.demote_pages(table, ids, PageTable.of([run]), ids)
    back = torch.zeros_like(values)
    naive.promote_pages(PageTable.of([run]), ids, PageTable.of([back]), ids)
    error = (back.float() - values.float()).abs()
    # Groups of normal numbers have their largest below 8: exponent -5 or less.
    assert (error <= torch.maximum(values.float().abs() / 16, torch.tensor(2.0**-15))).all()
    assert 0.02 < float(error.norm() / values.float().norm()) < 0.03


def test_a_group_that_is_not_finite_is_marked_and_the_others_are_not() -> None:
    values = torch.ones(1, 3 * naive.GROUP, dtype=torch.bfloat16)
    values[0, naive.GROUP] = float("nan")
    table = PageTable.of([values])
    run = torch.zeros(1, naive.demoted_bytes(table), dtype=torch.uint8)
    naive.demote_pages(table, torch.tensor([0]), PageTable.of([run]), torch.tensor([0]))
    exponents = run[0, 3 * naive.GROUP :][:3].view(torch.int8).tolist()
    assert exponents == [-8, naive.NOT_FINITE, -8]
    assert not run[0, naive.GROUP : 2 * naive.GROUP].any()

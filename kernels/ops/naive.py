"""What the kernels mean, in torch: the specification, and the fallback where there is no Triton.

Exact to the bit, on any device, slow. Page ids are int64 `[n]`, in range; destination ids are all
different, and no destination overlaps a source: else the result is undefined.
"""

import ctypes

import torch
from torch import Tensor

from impala_vllm.ops.pages import PageTable

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)

GROUP = 1024
"""Elements that share an exponent in an FP8 run. A fixed part of its format."""
LEAST_EXPONENT = -100
"""Smaller groups are scaled as if by this one, and vanish."""
NOT_FINITE = 127
"""Exponent of a group that holds an infinity or no number; its elements are zero."""


def copy_ranges(sources: Tensor, destinations: Tensor, num_bytes: Tensor) -> None:
    """Copy `num_bytes[i]` bytes from address `sources[i]` to `destinations[i]`; all int64 `[n]`.

    Here the addresses are the host's: torch opens no GPU memory by its address.
    """
    for source, destination, size in zip(sources.tolist(), destinations.tolist(), num_bytes.tolist(), strict=True):
        ctypes.memmove(destination, source, size)


def swap_pages(sources: PageTable, source_ids: Tensor, destinations: PageTable, destination_ids: Tensor) -> None:
    """Page `source_ids[i]` of every layer becomes page `destination_ids[i]` of the same layer."""
    for layer in range(len(sources.layers)):
        destinations.write(layer, destination_ids, sources.read(layer, source_ids))


def gather_pages(sources: PageTable, source_ids: Tensor, destinations: PageTable) -> None:
    """Scattered pages to the first `n` pages of `destinations`."""
    swap_pages(sources, source_ids, destinations, torch.arange(len(source_ids)))


def scatter_pages(sources: PageTable, destinations: PageTable, destination_ids: Tensor) -> None:
    """The first `n` pages of `sources` to scattered ones."""
    swap_pages(sources, torch.arange(len(destination_ids)), destinations, destination_ids)


def pack_pages(layers: PageTable, ids: Tensor, run: Tensor, checksums: Tensor | None = None) -> None:
    """Row `i` of `run` (uint8 `[n, layers.run_bytes]`) becomes page `ids[i]` of each layer, end to end.

    `checksums`, int64 `[n]`, gets `checksum` of each row.
    """
    gather_pages(layers, ids, PageTable.of_run(run, layers.page_bytes))
    if checksums is not None:
        checksums.copy_(checksum(run))


def unpack_pages(run: Tensor, layers: PageTable, ids: Tensor, checksums: Tensor | None = None) -> None:
    """Undo `pack_pages`. `checksums` gets those of the rows as read; the caller compares, pages are written anyhow."""
    scatter_pages(PageTable.of_run(run, layers.page_bytes), layers, ids)
    if checksums is not None:
        checksums.copy_(checksum(run))


def checksum(run: Tensor) -> Tensor:
    """int64 `[n]` of uint8 `[n, 8 k]`: the sum over its words of mix(word + (index + 1) * GOLDEN), modulo 2^64.

    Any order of summation gives the same, so that a GPU may take it in parts; the index makes the order
    of the words count. `mix` is the finaliser of SplitMix64 (https://prng.di.unimi.it/splitmix64.c).
    Against bytes that went bad, not against an adversary.
    """
    words = run.contiguous().view(torch.int64)
    index = torch.arange(1, words.shape[1] + 1, dtype=torch.int64, device=run.device)
    return _mix(words + index * GOLDEN).sum(dim=1)


def demoted_bytes(layers: PageTable) -> int:
    """Bytes of a row that `demote_pages` fills: a code an element, an exponent a group, up to a multiple of 8."""
    num_exponents = len(layers.page_bytes) * _groups(max(layers.page_bytes))
    return -(-(layers.run_bytes // 2 + num_exponents) // 8) * 8


def most_demoted_bytes(page_bytes: int, num_layers: int) -> int:
    """At least `demoted_bytes` of any layers whose pages have `page_bytes` together, `num_layers` of them or fewer, all
    of one size."""
    return -(-(page_bytes // 2 + page_bytes // 2 // GROUP + num_layers) // 8) * 8


def demote_pages(layers: PageTable, ids: Tensor, runs: PageTable, run_ids: Tensor) -> None:
    """Page `run_ids[i]` of `runs`, one layer of `demoted_bytes(layers)` or more, becomes page `ids[i]` of each layer as
    FP8, end to end.

    Pages hold bfloat16. `GROUP` elements after each other share an exponent k, the smallest for which none is above
    448 * 2^k; a code is the e4m3 next to element / 2^k, ties to even. Behind the codes of all layers stand the
    exponents, int8 `[layers, groups of the longest page]`; what follows them stays as it was. Off by at most 2^-4 of a
    value, or 2^(k - 10) if that is more. Groups with an infinity or NaN are zeros, with the exponent `NOT_FINITE`.
    """
    run = runs.read(0, run_ids)
    at, end = 0, layers.run_bytes // 2
    for layer, page_bytes in enumerate(layers.page_bytes):
        pages = layers.read(layer, ids).view(torch.bfloat16).float()
        groups = _padded(pages)  # [n, groups, GROUP]
        largest = groups.abs().amax(dim=2)
        is_finite = groups.isfinite().all(dim=2)
        exponents = _exponent(torch.where(is_finite, largest, 0.0)).to(torch.int8)
        codes = torch.ldexp(groups, -exponents.int().unsqueeze(2)).to(torch.float8_e4m3fn).view(torch.uint8)
        codes = torch.where(is_finite.unsqueeze(2), codes, 0)
        run[:, at : at + page_bytes // 2] = codes.flatten(1)[:, : page_bytes // 2].to(run.device)
        exponents = torch.where(is_finite, exponents, NOT_FINITE)
        run[:, end : end + exponents.shape[1]] = exponents.view(torch.uint8).to(run.device)
        at, end = at + page_bytes // 2, end + _groups(max(layers.page_bytes))
    runs.write(0, run_ids, run)


def promote_pages(runs: PageTable, run_ids: Tensor, layers: PageTable, ids: Tensor) -> None:
    """Pages `ids[i]` become what run `run_ids[i]` says, in bfloat16, which holds every such value exactly."""
    run = runs.read(0, run_ids)
    at, end = 0, layers.run_bytes // 2
    for layer, page_bytes in enumerate(layers.page_bytes):
        groups = _padded(run[:, at : at + page_bytes // 2].view(torch.float8_e4m3fn).float())
        exponents = run[:, end : end + groups.shape[1]].contiguous().view(torch.int8).int()
        pages = torch.ldexp(groups, exponents.unsqueeze(2)).flatten(1)[:, : page_bytes // 2]
        layers.write(layer, ids, pages.to(torch.bfloat16).contiguous().view(torch.uint8))
        at, end = at + page_bytes // 2, end + _groups(max(layers.page_bytes))


def _groups(page_bytes: int) -> int:
    return -(-page_bytes // 2 // GROUP)


def _padded(pages: Tensor) -> Tensor:
    """`[n, elements]` as `[n, groups, GROUP]`."""
    missing = -pages.shape[1] % GROUP
    return torch.nn.functional.pad(pages, (0, missing)).unflatten(1, (-1, GROUP))


def _exponent(largest: Tensor) -> Tensor:
    """The smallest k with `largest` <= 448 * 2^k, by which 1.75 * 2^8 is 448."""
    mantissa, exponent = torch.frexp(largest)  # in [0.5, 1)
    fits = (exponent - 9 + (mantissa > 0.875).int()).clamp(min=LEAST_EXPONENT)
    return torch.where(largest == 0, LEAST_EXPONENT, fits)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Right, filling with zeros; int64's own shift fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

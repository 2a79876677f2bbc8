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


def copy_ranges(sources: Tensor, destinations: Tensor, num_bytes: Tensor) -> None:
    """Copy `num_bytes[i]` bytes from address `sources[i]` to `destinations[i]`; all int64 `[n]`.

    Here the addresses are the host's: torch opens no GPU memory by its address.
    """
    for source, destination, size in zip(sources.tolist(), destinations.tolist(), num_bytes.tolist(), strict=True):
        ctypes.memmove(destination, source, size)


def swap_pages(sources: PageTable, source_ids: Tensor, destinations: PageTable, destination_ids: Tensor) -> None:
    """Page `source_ids[i]` of every layer becomes page `destination_ids[i]` of the same layer."""
    for source, destination in zip(sources.layers, destinations.layers, strict=True):
        pages = source[source_ids.to(source.device)]
        destination[destination_ids.to(destination.device)] = pages.to(destination.device)


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


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Right, filling with zeros; int64's own shift fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

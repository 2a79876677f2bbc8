"""Copies of many pages in one launch, by address: HBM to pinned host memory, back, or within either.

A few programs walk over all chunks of all pages, so that a running model keeps the rest of the GPU.
Launched on the current stream; nothing is waited for. `naive` says what each function means.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from impala_vllm.ops import tuning
from impala_vllm.ops.pages import WORD_BYTES, PageTable

SIZES = (
    *("num_ranges", "num_pages", "num_chunks", "num_groups", "num_elements", "chunks_per_page", "groups_per_page"),
    *("per_row", "source_per_row", "destination_per_row", "run_per_row", "run_stride"),
)
"""Arguments that change from launch to launch: a kernel of its own for sizes of 1 or multiples of 16 would be compiled
while a model waits."""
IDS = ("ids", "source_ids", "destination_ids", "run_ids", "checksums")


def jit(function: Any) -> Any:
    """`triton.jit`, one kernel for all sizes. A launch takes options beside the kernel's arguments."""
    return triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=IDS)(function)


def copy_ranges(sources: Tensor, destinations: Tensor, num_bytes: Tensor, device: torch.device) -> None:
    """As in `naive`, on `device`, and host addresses must be pinned memory's.

    Addresses and sizes are multiples of 8, unchecked. Pinned tables are read once the stream has come so far: leave
    them alone until then.
    """
    num_ranges = sources.numel()
    if num_ranges == 0:
        return
    launch = tuning.SWAP
    _copy_ranges[(min(launch.num_programs, num_ranges),)](
        sources.to(device, non_blocking=True),
        destinations.to(device, non_blocking=True),
        num_bytes.to(device, non_blocking=True),
        num_ranges,
        CHUNK_WORDS=launch.chunk_bytes // WORD_BYTES,
        **launch.options,
    )


def swap_pages(sources: PageTable, source_ids: Tensor, destinations: PageTable, destination_ids: Tensor) -> None:
    """As in `naive`. Both tables are of one device, on which the kernel runs."""
    if sources.page_bytes != destinations.page_bytes:
        raise ValueError(f"pages of {sources.page_bytes} bytes do not fit pages of {destinations.page_bytes}")
    if len(source_ids) != len(destination_ids):
        raise ValueError(f"{len(source_ids)} pages do not go to {len(destination_ids)} places")
    if sources.device != destinations.device:
        raise ValueError(f"one kernel runs on one device, not on {sources.device} and {destinations.device}")
    if len(source_ids) == 0:
        return
    launch = tuning.SWAP
    walk = Walk.over(sources, len(source_ids), launch)
    _swap_pages[walk.grid(launch)](
        sources.addresses,
        sources.row_strides,
        sources.strides,
        source_ids.to(sources.device, non_blocking=True),
        destinations.addresses,
        destinations.row_strides,
        destinations.strides,
        destination_ids.to(sources.device, non_blocking=True),
        sources.words,
        sources.pages_per_row,
        destinations.pages_per_row,
        len(source_ids),
        walk.chunks_per_page,
        walk.num_chunks,
        CHUNK_WORDS=walk.chunk_words,
        **launch.options,
    )


def gather_pages(sources: PageTable, source_ids: Tensor, destinations: PageTable) -> None:
    """As in `naive`."""
    swap_pages(sources, source_ids, destinations, torch.arange(len(source_ids), device=sources.device))


def scatter_pages(sources: PageTable, destinations: PageTable, destination_ids: Tensor) -> None:
    """As in `naive`."""
    swap_pages(sources, torch.arange(len(destination_ids), device=sources.device), destinations, destination_ids)


class Walk:
    """How the pages of a launch are cut into chunks; the last chunk of a page may be short, or empty."""

    def __init__(self, chunk_words: int, chunks_per_page: int, num_chunks: int) -> None:
        self.chunk_words = chunk_words
        self.chunks_per_page = chunks_per_page
        self.num_chunks = num_chunks

    @classmethod
    def over(cls, table: PageTable, num_pages: int, launch: tuning.Launch) -> "Walk":
        longest = max(table.page_bytes)
        chunk_bytes = min(launch.chunk_bytes, triton.next_power_of_2(longest))
        chunks_per_page = triton.cdiv(longest, chunk_bytes)
        return cls(chunk_bytes // WORD_BYTES, chunks_per_page, len(table.layers) * num_pages * chunks_per_page)

    def grid(self, launch: tuning.Launch) -> tuple[int]:
        return (min(launch.num_programs, self.num_chunks),)


def is_interpreted() -> bool:
    """Whether Triton runs kernels in Python, on memory of the host."""
    return bool(knobs.runtime.interpret)


# Arguments of a kernel have no types: Triton takes every name it sees in one for a global of the kernel.
@jit
def _copy_ranges(sources, destinations, num_bytes, num_ranges, CHUNK_WORDS: tl.constexpr):
    offsets = tl.arange(0, CHUNK_WORDS).to(tl.int64)
    i = tl.program_id(0).to(tl.int64)
    while i < num_ranges:
        source = tl.load(sources + i).to(tl.pointer_type(tl.int64))
        destination = tl.load(destinations + i).to(tl.pointer_type(tl.int64))
        words = tl.load(num_bytes + i) // 8
        start = words * 0
        while start < words:
            at = start + offsets
            mask = at < words
            tl.store(destination + at, tl.load(source + at, mask=mask, other=0), mask=mask)
            start += CHUNK_WORDS
        i += tl.num_programs(0)


@jit
def _swap_pages(
    source_addresses,  # [num_layers], as all tables but the ids
    source_row_strides,
    source_strides,
    source_ids,  # [num_pages]
    destination_addresses,
    destination_row_strides,
    destination_strides,
    destination_ids,  # [num_pages]
    page_words,
    source_per_row,
    destination_per_row,
    num_pages,
    chunks_per_page,
    num_chunks,
    CHUNK_WORDS: tl.constexpr,
):
    offsets = tl.arange(0, CHUNK_WORDS).to(tl.int64)
    i = tl.program_id(0).to(tl.int64)
    while i < num_chunks:
        # Chunks of a page are neighbours, then pages, then layers.
        page = (i // chunks_per_page) % num_pages
        layer = i // chunks_per_page // num_pages
        at = (i % chunks_per_page) * CHUNK_WORDS + offsets
        mask = at < tl.load(page_words + layer)
        source = tl.load(source_ids + page)
        source = page_at(source_addresses, source_row_strides, source_strides, source_per_row, layer, source)
        destination = tl.load(destination_ids + page)
        destination = page_at(
            destination_addresses, destination_row_strides, destination_strides, destination_per_row, layer, destination
        )
        source = source.to(tl.pointer_type(tl.int64))
        destination = destination.to(tl.pointer_type(tl.int64))
        tl.store(destination + at, tl.load(source + at, mask=mask, other=0), mask=mask)
        i += tl.num_programs(0)


@jit
def page_at(addresses, row_strides, strides, per_row, layer, page):
    """Address of an int64 page id of a table, as `PageTable` says."""
    row = (page // per_row) * tl.load(row_strides + layer)
    return tl.load(addresses + layer) + row + (page % per_row) * tl.load(strides + layer)

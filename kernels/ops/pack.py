"""Scattered pages of all layers to one contiguous run and back, in one launch, a checksum on the way.

A run is what a secondary tier reads and writes in one piece. `naive` says what each function means.
"""

import torch
import triton.language as tl
from torch import Tensor

from impala_vllm.ops import naive, tuning
from impala_vllm.ops.pages import WORD_BYTES, PageTable
from impala_vllm.ops.swap import Walk, jit, page_at

GOLDEN = tl.constexpr(naive.GOLDEN)
MIX_1 = tl.constexpr(naive.MIX_1)
MIX_2 = tl.constexpr(naive.MIX_2)


def pack_pages(layers: PageTable, ids: Tensor, run: Tensor, checksums: Tensor | None = None) -> None:
    """As in `naive`. The layers' device reaches `run` (pinned, if the host's); `checksums` is on that device."""
    _move(layers, ids, run, checksums, to_run=True)


def unpack_pages(run: Tensor, layers: PageTable, ids: Tensor, checksums: Tensor | None = None) -> None:
    """As in `naive`, with memory as in `pack_pages`."""
    _move(layers, ids, run, checksums, to_run=False)


def _move(layers: PageTable, ids: Tensor, run: Tensor, checksums: Tensor | None, *, to_run: bool) -> None:
    _check_run(layers, run)
    if len(ids) > run.shape[0]:
        raise ValueError(f"a run of {run.shape[0]} rows does not hold {len(ids)} pages")
    if checksums is not None:
        if checksums.shape != ids.shape or checksums.device != layers.device:
            raise ValueError(f"checksums are int64 [{len(ids)}] on {layers.device}")
        checksums.zero_()
    if len(ids) == 0:
        return
    launch = tuning.PACK
    walk = Walk.over(layers, len(ids), launch)
    _pack[walk.grid(launch)](
        layers.addresses,
        layers.row_strides,
        layers.strides,
        ids.to(layers.device, non_blocking=True),
        layers.words,
        layers.word_offsets,
        layers.addresses if checksums is None else checksums,
        run.data_ptr(),
        run.stride(0),
        layers.pages_per_row,
        len(ids),
        walk.chunks_per_page,
        walk.num_chunks,
        CHUNK_WORDS=walk.chunk_words,
        TO_RUN=to_run,
        CHECKSUM=checksums is not None,
        **launch.options,
    )


def _check_run(layers: PageTable, run: Tensor) -> None:
    """Raise ValueError for a run of other rows, or that a kernel cannot address.

    A table of the run would say the same, but building one waits for the device.
    """
    if run.dtype != torch.uint8 or run.dim() != 2 or run.shape[1] != layers.run_bytes or run.stride(1) != 1:
        raise ValueError(f"a run is uint8 [num_pages, {layers.run_bytes}], not {run.dtype} {list(run.shape)}")
    if run.data_ptr() % WORD_BYTES or run.stride(0) % WORD_BYTES:
        raise ValueError(f"a run's address and stride are multiples of {WORD_BYTES} bytes")
    if run.device != layers.device and not run.is_pinned():
        raise ValueError("a GPU reaches host memory by address only where it is pinned")


# Arguments of a kernel have no types: Triton takes every name it sees in one for a global of the kernel.
@jit
def _pack(
    addresses,  # [num_layers], as all tables but ids and checksums
    row_strides,
    strides,
    ids,  # [num_pages]
    page_words,
    word_offsets,
    checksums,  # [num_pages], zeros; not touched without CHECKSUM
    run_address,
    run_stride,
    per_row,
    num_pages,
    chunks_per_page,
    num_chunks,
    CHUNK_WORDS: tl.constexpr,
    TO_RUN: tl.constexpr,
    CHECKSUM: tl.constexpr,
):
    offsets = tl.arange(0, CHUNK_WORDS).to(tl.int64)
    i = tl.program_id(0).to(tl.int64)
    while i < num_chunks:
        page = (i // chunks_per_page) % num_pages
        layer = i // chunks_per_page // num_pages
        at = (i % chunks_per_page) * CHUNK_WORDS + offsets
        mask = at < tl.load(page_words + layer)
        scattered = page_at(addresses, row_strides, strides, per_row, layer, tl.load(ids + page))
        packed = page * run_stride + run_address + tl.load(word_offsets + layer) * 8
        scattered = scattered.to(tl.pointer_type(tl.int64))
        packed = packed.to(tl.pointer_type(tl.int64))
        if TO_RUN:
            words = tl.load(scattered + at, mask=mask, other=0)
            tl.store(packed + at, words, mask=mask)
        else:
            words = tl.load(packed + at, mask=mask, other=0)
            tl.store(scattered + at, words, mask=mask)
        if CHECKSUM:
            index = tl.load(word_offsets + layer) + at + 1
            mixed = tl.where(mask, _mix(words + index * GOLDEN), 0)
            tl.atomic_add(checksums + page, tl.sum(mixed, axis=0))
        i += tl.num_programs(0)


@jit
def _mix(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)

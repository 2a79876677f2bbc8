"""Pages of bfloat16 to runs of FP8 (e4m3) and back, in one launch: half the bytes, at a loss. Opt-in.

`naive` says what each function means. Kernels round with integers, so that every GPU gives the same bits.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from impala_vllm.ops import naive, tuning
from impala_vllm.ops.pages import PageTable
from impala_vllm.ops.swap import jit, page_at

LEAST_EXPONENT = tl.constexpr(naive.LEAST_EXPONENT)
NOT_FINITE = tl.constexpr(naive.NOT_FINITE)


def demote_pages(layers: PageTable, ids: Tensor, runs: PageTable, run_ids: Tensor) -> None:
    """As in `naive`. Both tables are of one device, on which the kernel runs."""
    _move(_demote, layers, ids, runs, run_ids)


def promote_pages(runs: PageTable, run_ids: Tensor, layers: PageTable, ids: Tensor) -> None:
    """As in `naive`, with memory as in `demote_pages`."""
    _move(_promote, layers, ids, runs, run_ids)


def _move(kernel: Any, layers: PageTable, ids: Tensor, runs: PageTable, run_ids: Tensor) -> None:
    if len(runs.layers) != 1 or runs.run_bytes < naive.demoted_bytes(layers):
        raise ValueError(f"runs are one layer of {naive.demoted_bytes(layers)} bytes or more, not {runs.page_bytes}")
    if len(ids) != len(run_ids) or runs.device != layers.device:
        raise ValueError(f"{len(ids)} pages on {layers.device} do not go with {len(run_ids)} runs on {runs.device}")
    if len(ids) == 0:
        return
    launch = tuning.FP8
    groups_per_page = triton.cdiv(max(layers.page_bytes) // 2, naive.GROUP)
    num_groups = len(layers.layers) * len(ids) * groups_per_page
    kernel[(min(launch.num_programs, num_groups),)](
        layers.addresses,
        layers.row_strides,
        layers.strides,
        ids.to(layers.device, non_blocking=True),
        layers.words,
        layers.word_offsets,
        runs.addresses,
        runs.row_strides,
        runs.strides,
        run_ids.to(layers.device, non_blocking=True),
        layers.pages_per_row,
        runs.pages_per_row,
        layers.run_bytes // 2,
        len(ids),
        groups_per_page,
        num_groups,
        GROUP=naive.GROUP,
        **launch.options,
    )


# Arguments of a kernel have no types: Triton takes every name it sees in one for a global of the kernel.
@jit
def _demote(
    addresses,  # [num_layers], as all tables but ids and those of the runs
    row_strides,
    strides,
    ids,  # [num_pages]
    page_words,
    word_offsets,
    run_addresses,  # [1], as the next two
    run_row_strides,
    run_strides,
    run_ids,  # [num_pages]
    per_row,
    run_per_row,
    num_elements,
    num_pages,
    groups_per_page,
    num_groups,
    GROUP: tl.constexpr,
):
    offsets = tl.arange(0, GROUP).to(tl.int64)
    i = tl.program_id(0).to(tl.int64)
    while i < num_groups:
        group = i % groups_per_page
        page = (i // groups_per_page) % num_pages
        layer = i // groups_per_page // num_pages
        at = group * GROUP + offsets
        mask = at < tl.load(page_words + layer) * 4
        source = page_at(addresses, row_strides, strides, per_row, layer, tl.load(ids + page))
        bits = tl.load(source.to(tl.pointer_type(tl.int16)) + at, mask=mask, other=0).to(tl.int32)
        magnitude = bits & 0x7FFF
        # `tl.max` may return indices too, so its type does not say that this is a number.
        largest = tl.max(magnitude, axis=0).to(tl.int32)  # pyright: ignore[reportAttributeAccessIssue]
        exponent = tl.maximum((largest >> 7) - 135 + ((largest & 0x7F) > 0x60).to(tl.int32), LEAST_EXPONENT)
        is_finite = largest < 0x7F80
        scaled = (magnitude << 16).to(tl.float32, bitcast=True) * _power(tl.where(is_finite, -exponent, 0))
        codes = tl.where(is_finite, _encode(scaled) | ((bits >> 8) & 0x80), 0)
        row = page_at(run_addresses, run_row_strides, run_strides, run_per_row, 0, tl.load(run_ids + page))
        packed = (row + tl.load(word_offsets + layer) * 4).to(tl.pointer_type(tl.int8))
        tl.store(packed + at, codes.to(tl.int8), mask=mask)
        packed = (row + num_elements + layer * groups_per_page + group).to(tl.pointer_type(tl.int8))
        is_there = group * GROUP < tl.load(page_words + layer) * 4
        tl.store(packed, tl.where(is_finite, exponent, NOT_FINITE).to(tl.int8), mask=is_there)
        i += tl.num_programs(0)


@jit
def _promote(
    addresses,
    row_strides,
    strides,
    ids,
    page_words,
    word_offsets,
    run_addresses,
    run_row_strides,
    run_strides,
    run_ids,
    per_row,
    run_per_row,
    num_elements,
    num_pages,
    groups_per_page,
    num_groups,
    GROUP: tl.constexpr,
):
    offsets = tl.arange(0, GROUP).to(tl.int64)
    i = tl.program_id(0).to(tl.int64)
    while i < num_groups:
        group = i % groups_per_page
        page = (i // groups_per_page) % num_pages
        layer = i // groups_per_page // num_pages
        at = group * GROUP + offsets
        mask = at < tl.load(page_words + layer) * 4
        row = page_at(run_addresses, run_row_strides, run_strides, run_per_row, 0, tl.load(run_ids + page))
        packed = (row + num_elements + layer * groups_per_page + group).to(tl.pointer_type(tl.int8))
        is_there = group * GROUP < tl.load(page_words + layer) * 4
        exponent = tl.load(packed, mask=is_there, other=0).to(tl.int32)
        packed = (row + tl.load(word_offsets + layer) * 4).to(tl.pointer_type(tl.int8))
        codes = tl.load(packed + at, mask=mask, other=0).to(tl.int32)
        scaled = _decode(codes & 0x7F) * _power(exponent)
        bits = (scaled.to(tl.int32, bitcast=True) >> 16) | ((codes & 0x80) << 8)
        target = page_at(addresses, row_strides, strides, per_row, layer, tl.load(ids + page))
        tl.store(target.to(tl.pointer_type(tl.int16)) + at, bits.to(tl.int16), mask=mask)
        i += tl.num_programs(0)


@jit
def _power(exponent):
    """2^exponent, for exponents from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@jit
def _encode(x):
    """The e4m3 code of each x from 0 to 448, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are 2^-9 apart. Adding 1.5 * 2^23 leaves the rounded number in the last bits.
    small = (x * 512.0 + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return tl.where(x < 0.015625, small, normal)


@jit
def _decode(codes):
    """What e4m3 codes without sign stand for."""
    normal = ((codes + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    return tl.where(codes < 8, codes.to(tl.float32) * 0.001953125, normal)

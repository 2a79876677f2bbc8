"""Which version of an op runs: Triton's where it is installed and its device is there, else torch's."""

from types import ModuleType

import torch
from torch import Tensor

from impala_vllm.ops import naive
from impala_vllm.ops.pages import PageTable

try:
    from impala_vllm.ops import fp8, pack, swap
except ImportError:
    fp8 = pack = swap = None


def has_triton(device: torch.device) -> bool:
    """Whether ops on `device` run as kernels."""
    return swap is not None and (device.type == "cuda" or swap.is_interpreted())


def copy_ranges(sources: Tensor, destinations: Tensor, num_bytes: Tensor, device: torch.device) -> None:
    """`naive.copy_ranges` on `device`. Raises ValueError on a GPU without Triton: use the engine's own copy."""
    if not has_triton(device) and device.type != "cpu":
        raise ValueError(f"copying by address on {device} needs Triton")
    if swap is not None and has_triton(device):
        swap.copy_ranges(sources, destinations, num_bytes, device)
    else:
        naive.copy_ranges(sources, destinations, num_bytes)


def swap_pages(sources: PageTable, source_ids: Tensor, destinations: PageTable, destination_ids: Tensor) -> None:
    """`naive.swap_pages`."""
    _of(swap, sources.device).swap_pages(sources, source_ids, destinations, destination_ids)


def gather_pages(sources: PageTable, source_ids: Tensor, destinations: PageTable) -> None:
    """`naive.gather_pages`."""
    _of(swap, sources.device).gather_pages(sources, source_ids, destinations)


def scatter_pages(sources: PageTable, destinations: PageTable, destination_ids: Tensor) -> None:
    """`naive.scatter_pages`."""
    _of(swap, sources.device).scatter_pages(sources, destinations, destination_ids)


def pack_pages(layers: PageTable, ids: Tensor, run: Tensor, checksums: Tensor | None = None) -> None:
    """`naive.pack_pages`."""
    _of(pack, layers.device).pack_pages(layers, ids, run, checksums)


def unpack_pages(run: Tensor, layers: PageTable, ids: Tensor, checksums: Tensor | None = None) -> None:
    """`naive.unpack_pages`."""
    _of(pack, layers.device).unpack_pages(run, layers, ids, checksums)


def demote_pages(layers: PageTable, ids: Tensor, runs: PageTable, run_ids: Tensor) -> None:
    """`naive.demote_pages`."""
    _of(fp8, layers.device).demote_pages(layers, ids, runs, run_ids)


def promote_pages(runs: PageTable, run_ids: Tensor, layers: PageTable, ids: Tensor) -> None:
    """`naive.promote_pages`."""
    _of(fp8, layers.device).promote_pages(runs, run_ids, layers, ids)


def _of(kernels: ModuleType | None, device: torch.device) -> ModuleType:
    return kernels if kernels is not None and has_triton(device) else naive

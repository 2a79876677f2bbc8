"""Where pages of KV lie: the address, stride and page size of every layer, as a kernel reads them.

Page `i` of layer `l` is the `page_bytes[l]` bytes at `addresses[l] + i * strides[l]`. Strides may be
longer than a page (layers interleaved in one slab, K beside V, chunks of a host tier).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

WORD_BYTES = 8


@dataclass(frozen=True, slots=True)
class PageTable:
    """Built once for memory that stays where it is; holds on to the tensors, so addresses stay good."""

    layers: tuple[Tensor, ...]
    """uint8 `[num_pages, page_bytes]` each, dense in the last dimension."""
    page_bytes: tuple[int, ...]
    addresses: Tensor
    """int64 `[num_layers]` on `device`, as are the next three."""
    strides: Tensor
    words: Tensor
    """Page size in 8-byte words."""
    word_offsets: Tensor
    """Where a layer's page begins in a run that holds one page of each layer in order, in words."""
    device: torch.device
    """Where a kernel on these pages runs."""

    @property
    def run_bytes(self) -> int:
        """One page of each layer, end to end."""
        return sum(self.page_bytes)

    @classmethod
    def of(cls, layers: Sequence[Tensor], device: torch.device | None = None) -> "PageTable":
        """Of tensors `[num_pages, page elements]` of any dtype, in HBM or in host memory.

        Waits for the device, which is given the tables. `device` defaults to the tensors' own; give the GPU for
        pinned host memory that it reaches by address. Raises ValueError for no layers, mixed devices, a page that is
        not dense, and bytes that are no multiple of 8.
        """
        if not layers:
            raise ValueError("a page table needs at least one layer")
        pages = tuple(_as_bytes(layer) for layer in layers)
        places = {layer.device for layer in pages}
        if len(places) > 1:
            raise ValueError(f"layers of one table lie on one device, not on {sorted(map(str, places))}")
        runs_on = pages[0].device if device is None else device
        if runs_on.type != "cpu" and pages[0].device.type == "cpu" and not all(p.is_pinned() for p in pages):
            raise ValueError("a GPU reaches host memory by address only where it is pinned")
        sizes = tuple(layer.shape[1] for layer in pages)
        addresses = [layer.data_ptr() for layer in pages]
        strides = [layer.stride(0) for layer in pages]
        odd = [number for number in (*sizes, *addresses, *strides) if number % WORD_BYTES]
        if odd:
            raise ValueError(f"page sizes, strides and addresses are multiples of {WORD_BYTES} bytes, not {odd[0]}")
        words = [size // WORD_BYTES for size in sizes]
        return cls(
            pages,
            sizes,
            _table(addresses, runs_on),
            _table(strides, runs_on),
            _table(words, runs_on),
            _table([0, *accumulate(words)][:-1], runs_on),
            runs_on,
        )

    @classmethod
    def of_run(cls, run: Tensor, page_bytes: Sequence[int], device: torch.device | None = None) -> "PageTable":
        """Of uint8 `[num_pages, sum(page_bytes)]` whose rows hold one page of each layer in order."""
        if run.dtype != torch.uint8 or run.dim() != 2 or run.shape[1] != sum(page_bytes):
            raise ValueError(f"a run is uint8 [num_pages, {sum(page_bytes)}], not {run.dtype} {list(run.shape)}")
        return cls.of(run.split(list(page_bytes), dim=1), device)


def _as_bytes(layer: Tensor) -> Tensor:
    if layer.dim() != 2:
        raise ValueError(f"a layer is [num_pages, page elements], not {list(layer.shape)}")
    if layer.stride(1) != 1:
        raise ValueError(f"the elements of a page lie next to each other, not {layer.stride(1)} apart")
    return layer.view(torch.uint8)


def _table(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64).to(device)

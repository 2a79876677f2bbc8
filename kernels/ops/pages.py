"""Where pages of KV lie: the address, stride and page size of every layer, as a kernel reads them.

Pages lie in rows of `pages_per_row`, one in a row unless the layers say otherwise. Page `i` of layer `l` is the
`page_bytes[l]` bytes at `addresses[l] + i // pages_per_row * row_strides[l] + i % pages_per_row * strides[l]`. That
covers layers interleaved in one slab, K beside V, and the chunks of a host tier, which hold several pages of a layer.
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
    """uint8 `[num_rows, pages_per_row, page_bytes]` each, dense in the last dimension."""
    page_bytes: tuple[int, ...]
    pages_per_row: int
    places: Tensor
    """int64 `[3, num_layers]` in host memory: addresses, strides of rows and of pages in a row."""
    addresses: Tensor
    """int64 `[num_layers]` on `device`, as are the next four."""
    row_strides: Tensor
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

    def addresses_of(self, ids: Tensor) -> Tensor:
        """int64 `[num_layers, n]`: where pages `ids`, int64 in host memory, begin in each layer."""
        addresses, row_strides, strides = self.places.unsqueeze(2)
        return addresses + ids // self.pages_per_row * row_strides + ids % self.pages_per_row * strides

    def read(self, layer: int, ids: Tensor) -> Tensor:
        """uint8 `[n, page_bytes[layer]]`, a copy where the layer is."""
        pages = self.layers[layer]
        ids = ids.to(pages.device)
        return pages[ids // self.pages_per_row, ids % self.pages_per_row]

    def write(self, layer: int, ids: Tensor, pages: Tensor) -> None:
        """Pages `ids` become uint8 `[n, page_bytes[layer]]`; all ids are different."""
        target = self.layers[layer]
        ids = ids.to(target.device)
        target[ids // self.pages_per_row, ids % self.pages_per_row] = pages.to(target.device)

    @classmethod
    def of(cls, layers: Sequence[Tensor], device: torch.device | None = None) -> "PageTable":
        """Of tensors `[num_pages, page elements]` or `[num_rows, pages of a row, page elements]` of any dtype, in HBM
        or in host memory.

        Waits for the device, which is given the tables. `device` defaults to the tensors' own; give the GPU for
        pinned host memory that it reaches by address. Raises ValueError for no layers, mixed devices, rows of
        different lengths, a page that is not dense, and bytes that are no multiple of 8.
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
        lengths = {layer.shape[1] for layer in pages}
        if len(lengths) > 1:
            raise ValueError(f"layers of one table have as many pages in a row, not {sorted(lengths)}")
        sizes = tuple(layer.shape[2] for layer in pages)
        places = [[p.data_ptr() for p in pages], [p.stride(0) for p in pages], [p.stride(1) for p in pages]]
        odd = [number for numbers in (sizes, *places) for number in numbers if number % WORD_BYTES]
        if odd:
            raise ValueError(f"page sizes, strides and addresses are multiples of {WORD_BYTES} bytes, not {odd[0]}")
        words = [size // WORD_BYTES for size in sizes]
        numbers = torch.tensor([*places, words, [0, *accumulate(words)][:-1]], dtype=torch.int64)
        addresses, row_strides, strides, counts, offsets = numbers.to(runs_on)
        return cls(
            pages,
            sizes,
            lengths.pop(),
            numbers[:3],
            addresses,
            row_strides,
            strides,
            counts,
            offsets,
            runs_on,
        )

    @classmethod
    def of_run(cls, run: Tensor, page_bytes: Sequence[int], device: torch.device | None = None) -> "PageTable":
        """Of uint8 `[num_pages, sum(page_bytes)]` whose rows hold one page of each layer in order."""
        if run.dtype != torch.uint8 or run.dim() != 2 or run.shape[1] != sum(page_bytes):
            raise ValueError(f"a run is uint8 [num_pages, {sum(page_bytes)}], not {run.dtype} {list(run.shape)}")
        return cls.of(run.split(list(page_bytes), dim=1), device)


def _as_bytes(layer: Tensor) -> Tensor:
    if layer.dim() == 2:
        layer = layer.unsqueeze(1)
    if layer.dim() != 3:
        raise ValueError(f"a layer is [num_pages, page elements], in rows or not, not {list(layer.shape)}")
    if layer.stride(2) != 1:
        raise ValueError(f"the elements of a page lie next to each other, not {layer.stride(2)} apart")
    return layer.view(torch.uint8)

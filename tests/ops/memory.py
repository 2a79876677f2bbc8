"""Memory for the kernels' tests: random pages with a canary round every one of them."""

import torch
from torch import Tensor

CANARY = 0xA5


def layers(num_pages: int, page_bytes: list[int], *, gap_bytes: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """One slab and a view `[num_pages, size]` of it per size: a row of the slab holds a page of each, `gap_bytes`
    of canary before each page and after the last."""
    row = gap_bytes + sum(size + gap_bytes for size in page_bytes)
    slab = torch.full((num_pages + 2, row), CANARY, dtype=torch.uint8)
    views, at = [], gap_bytes
    for number, size in enumerate(page_bytes):
        view = slab[1:-1, at : at + size]
        view.copy_(random_bytes(num_pages, size, seed=seed + number))
        views.append(view)
        at += size + gap_bytes
    return slab, views


def packed(num_pages: int, page_bytes: list[int], *, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Each layer dense and by itself, a page of canary before and after it; the slab is all of them."""
    slab = torch.full((sum((num_pages + 2) * size for size in page_bytes),), CANARY, dtype=torch.uint8)
    views, at = [], 0
    for number, size in enumerate(page_bytes):
        view = slab[at + size : at + (num_pages + 1) * size].view(num_pages, size)
        view.copy_(random_bytes(num_pages, size, seed=seed + number))
        views.append(view)
        at += (num_pages + 2) * size
    return slab, views


def random_bytes(num_pages: int, size: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_pages, size), dtype=torch.uint8, generator=generator)


def some_ids(count: int, among: int, *, seed: int) -> Tensor:
    """`count` different page ids in random order."""
    return torch.randperm(among, generator=torch.Generator().manual_seed(seed))[:count]

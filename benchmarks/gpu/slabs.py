"""Pages to move: layers cut out of one slab whose every other byte is a canary."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu import device

CANARY = 0xA5


@dataclass(frozen=True, slots=True)
class Slab:
    """uint8 memory on one side of the link, and the layers in it."""

    memory: Tensor
    layers: list[Tensor]
    """`[num_pages, page_bytes]` each."""

    @classmethod
    def of(
        cls, num_pages: int, page_bytes: list[int], place: torch.device, *, on_host: bool, is_strided: bool, seed: int
    ) -> "Slab":
        """Random pages. Strided: a row holds a page of each layer between gaps; else each layer is dense."""
        gap = 64 if is_strided else 0
        row = gap + sum(size + gap for size in page_bytes)
        num_bytes = num_pages * row + 128
        memory = device.host_bytes(num_bytes, place) if on_host else device.device_bytes(num_bytes, place)
        memory.fill_(CANARY)
        body = memory[64:-64]
        layers: list[Tensor] = []
        at = gap
        for size in page_bytes:
            if is_strided:
                layers.append(body.view(num_pages, row)[:, at : at + size])
                at += size + gap
            else:
                layers.append(body[at : at + num_pages * size].view(num_pages, size))
                at += num_pages * size
        generator = torch.Generator().manual_seed(seed)
        for layer in layers:
            layer.copy_(torch.randint(0, 256, tuple(layer.shape), dtype=torch.uint8, generator=generator))
        return cls(memory, layers)

    def copy(self) -> Tensor:
        """All its bytes, canaries included, in ordinary host memory."""
        return self.memory.cpu().clone()


def ids(count: int, among: int, seed: int) -> Tensor:
    """Different page ids in random order, int64."""
    return torch.randperm(among, generator=torch.Generator().manual_seed(seed))[:count]

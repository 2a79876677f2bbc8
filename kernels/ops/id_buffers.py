"""Page ids on their way to the kernels of a lane, in memory that is taken before a model runs."""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MOST_PAIRS = 8192
"""131,072 tokens in blocks of 16; longer batches go in slices."""
NUM_SLOTS = 8
"""Batches under way at once before more pinned memory is taken."""


class IdBuffers:
    """Of one lane, whose order keeps what is sent good until the kernel after it has read it. One thread's.

    Taking pinned memory or HBM may make a driver wait for everything under way, and HBM may be full by then. So both
    are taken here: 16 bytes a pair in HBM once, in pinned memory `num_slots` times.
    """

    def __init__(self, device: torch.device, most_pairs: int = MOST_PAIRS, num_slots: int = NUM_SLOTS) -> None:
        self.most_pairs = most_pairs
        self._there = torch.empty(2 * most_pairs, dtype=torch.int64, device=device)
        self._slots = deque(self._slot() for _ in range(num_slots))

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    def send(self, source_ids: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Both on the device, once the current stream has come so far; at most `most_pairs` of them.

        Waits for nothing. The arguments, in host memory, are the caller's again on return.
        """
        count = len(source_ids)
        slot = self._free()
        pair, there = slot.pinned[: 2 * count], self._there[: 2 * count]
        pair[:count] = source_ids
        pair[count:] = target_ids
        there.copy_(pair, non_blocking=True)
        slot.read.record()
        return there[:count], there[count:]

    def _free(self) -> "_Slot":
        """The slot sent longest ago; a new one while that is on its way."""
        if not self._slots[0].read.query():
            self._slots.appendleft(self._slot())
        self._slots.rotate(-1)
        return self._slots[-1]

    def _slot(self) -> "_Slot":
        is_pinned = self._there.device.type == "cuda"
        pinned = torch.empty(2 * self.most_pairs, dtype=torch.int64, pin_memory=is_pinned)
        return _Slot(pinned, torch.cuda.Event() if is_pinned else _Past())


class _Read(Protocol):
    """When a slot was last read, as `torch.cuda.Event` tells it."""

    def record(self) -> None: ...

    def query(self) -> bool: ...


class _Past:
    """On memory of the host: at once."""

    def record(self) -> None: ...

    def query(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class _Slot:
    pinned: Tensor
    read: _Read

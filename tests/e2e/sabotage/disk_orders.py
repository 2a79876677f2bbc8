"""Breaks the NVMe tier of a running server on order: while a file lies in the folder IMPALA_DISK_ORDERS, it is obeyed.

`hang`: reads that come do not end before it is gone; `hung` then says that there were some. `die`: the tier's thread
fails. Without `hang` no read counts as late: a sound disk of a busy machine must not pass for a bad one.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from impala_vllm.adapters.vllm.tiers.nvme import NvmeTier
from impala_vllm.transfer import block_io, limits
from impala_vllm.transfer.block_io import BlockIo, Completion, Op
from impala_vllm.transfer.coordinator import Coordinator

ORDERS = Path(os.environ["IMPALA_DISK_ORDERS"])
LOOK_S = 0.05

_open, _step, _is_late = block_io.open_block_io, Coordinator.step, NvmeTier.is_late


class HangingIo:
    """Another engine, whose reads wait for `hang` to go."""

    def __init__(self, io: BlockIo) -> None:
        self._io = io
        self._kept: list[Op] = []
        self.alignment_bytes = io.alignment_bytes
        self.name = io.name

    @property
    def num_in_flight(self) -> int:
        return self._io.num_in_flight + len(self._kept)

    def submit(self, ops: Sequence[Op]) -> None:
        kept = [op for op in ops if not op.is_write] if _hangs() else []
        if kept:
            (ORDERS / "hung").touch()
            self._kept += kept
            ops = [op for op in ops if op.is_write]
        if ops:
            self._io.submit(ops)

    def poll(self, timeout_s: float = 0.0) -> list[Completion]:
        if self._kept and not _hangs():
            self._io.submit(self._kept)
            self._kept = []
        return self._io.poll(min(timeout_s, LOOK_S) if self._kept else timeout_s)

    def wake(self) -> None:
        self._io.wake()

    def close(self) -> None:
        self._io.close()


def _hangs() -> bool:
    return (ORDERS / "hang").exists()


def _hanging(fd: int, depth: int = 16, deadline_s: float | None = None, region: memoryview | None = None) -> HangingIo:
    return HangingIo(_open(fd, depth, deadline_s, region))


def _step_or_die(self: Coordinator, max_wait_s: float = 60.0) -> None:
    if (ORDERS / "die").exists():
        raise RuntimeError("sabotage")
    _step(self, max_wait_s)


def _is_late_if_it_hangs(self: NvmeTier, key: bytes, now: float) -> bool:
    return _hangs() and _is_late(self, key, now)


block_io.open_block_io = _hanging
limits.Limits = partial(limits.Limits, stuck_s=10.0, cooldown_s=1.0, max_cooldown_s=2.0)
Coordinator.step = _step_or_die
NvmeTier.is_late = _is_late_if_it_hangs

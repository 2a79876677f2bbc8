"""Breaks the NVMe tier of a running server on order: while a file lies in the folder IMPALA_DISK_ORDERS, it is obeyed.

`hang`: reads that come do not end before it is gone; `hung` then says that there were some. `slow`: they end, `SLOW_S`
after they came. `vanish`: the tier's thread is gone, without an error. Without the first two no read counts as late: a
sound disk of a busy machine must not pass for a bad one.
"""

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from impala_vllm.adapters.vllm.tiers.nvme import NvmeTier
from impala_vllm.transfer import block_io, limits
from impala_vllm.transfer.block_io import BlockIo, Completion, Op
from impala_vllm.transfer.coordinator import Coordinator

ORDERS = Path(os.environ["IMPALA_DISK_ORDERS"])
LOOK_S = 0.05
SLOW_S = 3.0
"""Longer than turns wait, shorter than what passes for a disk that hangs."""

_open, _step, _is_late = block_io.open_block_io, Coordinator.step, NvmeTier.is_late


class HangingIo:
    """Another engine, whose reads wait for `hang` to go, or take their time."""

    def __init__(self, io: BlockIo) -> None:
        self._io = io
        self._kept: list[Op] = []
        self._slow: list[tuple[float, Op]] = []
        """When each shall start, in that order."""
        self.alignment_bytes = io.alignment_bytes
        self.name = io.name

    @property
    def num_in_flight(self) -> int:
        return self._io.num_in_flight + len(self._kept) + len(self._slow)

    def submit(self, ops: Sequence[Op]) -> None:
        kept = [op for op in ops if not op.is_write] if _hangs() or _is_slow() else []
        if kept:
            ops = [op for op in ops if op.is_write]
            if _hangs():
                (ORDERS / "hung").touch()
                self._kept += kept
            else:
                self._slow += [(time.monotonic() + SLOW_S, op) for op in kept]
        if ops:
            self._io.submit(ops)

    def poll(self, timeout_s: float = 0.0) -> list[Completion]:
        if self._kept and not _hangs():
            self._io.submit(self._kept)
            self._kept = []
        due = [op for start_s, op in self._slow if start_s <= time.monotonic()]
        if due:
            self._io.submit(due)
            self._slow = self._slow[len(due) :]
        return self._io.poll(min(timeout_s, LOOK_S) if self._kept or self._slow else timeout_s)

    def wake(self) -> None:
        self._io.wake()

    def close(self) -> None:
        self._io.close()


def _hangs() -> bool:
    return (ORDERS / "hang").exists()


def _is_slow() -> bool:
    return (ORDERS / "slow").exists()


def _hanging(fd: int, depth: int = 16, deadline_s: float | None = None, region: memoryview | None = None) -> HangingIo:
    return HangingIo(_open(fd, depth, deadline_s, region))


def _step_or_vanish(self: Coordinator, max_wait_s: float = 60.0) -> None:
    if (ORDERS / "vanish").exists():
        raise SystemExit("sabotage")
    _step(self, max_wait_s)


def _is_late_if_the_disk_is(self: NvmeTier, key: bytes, now: float) -> bool:
    return (_hangs() or _is_slow()) and _is_late(self, key, now)


block_io.open_block_io = _hanging
limits.Limits = partial(limits.Limits, stuck_s=10.0, cooldown_s=1.0, max_cooldown_s=2.0)
Coordinator.step = _step_or_vanish
NvmeTier.is_late = _is_late_if_the_disk_is

"""Notices a plan under which nothing moves although somebody waits."""

from typing import TYPE_CHECKING

from vllm.v1.core.sched.interface import PauseState

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

    from impala_vllm.adapters.vllm.tiers.policy import TierPolicy

STALLED_S = 10.0
"""Nothing runs, somebody waits and nothing was scheduled for this long: the plan is at fault, or might be."""


class Stalled(RuntimeError):
    """Turns wait, nothing runs, and no step schedules anything."""


class Watchdog:
    """Told of every step. O(1)."""

    def __init__(self, scheduler: "Scheduler", tiers: "TierPolicy | None") -> None:
        self._scheduler = scheduler
        self._tiers = tiers
        self._still_since_s: float | None = None

    def watch(self, output: "SchedulerOutput", num_waiting: int, now: float) -> None:
        """A step was built while `num_waiting` turns waited for a place. Raises Stalled."""
        scheduler = self._scheduler
        is_paused = scheduler.pause_state != PauseState.UNPAUSED
        # A turn whose KV is being loaded is in neither list.
        loads = len(scheduler.kv_holding_waiting) > scheduler.num_waiting_for_streaming_input
        loads = loads or (self._tiers is not None and self._tiers.is_loading(now))
        moves = output.num_scheduled_tokens or scheduler.running or loads or is_paused
        if moves or not num_waiting:
            self._still_since_s = None
        elif self._still_since_s is None:
            self._still_since_s = now
        elif now - self._still_since_s >= STALLED_S:
            raise Stalled(f"{num_waiting} turns wait and nothing was scheduled for {STALLED_S:.0f} s")

"""Notices a plan under which nothing moves although somebody waits, and has stock's order tried."""

import logging
from typing import TYPE_CHECKING

from vllm.v1.core.sched.interface import PauseState

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

    from impala_vllm.adapters.vllm.tiers.policy import TierPolicy

logger = logging.getLogger("vllm.impala")

STALLED_S = 10.0
"""Nothing runs, somebody waits and nothing was scheduled for this long: the plan is at fault, or might be."""


class Stalled(RuntimeError):
    """Nothing moved under the plan, and something did as soon as the plan was left out."""


class Watchdog:
    """Told of every step. O(1).

    What is in the way need not be the plan: ended turns whose KV another engine has yet to fetch keep the pool, as do
    streaming sessions. So everybody is let through first. Where that helps at once, the plan was at fault; else policy
    goes on as soon as something moves.
    """

    def __init__(self, scheduler: "Scheduler", tiers: "TierPolicy | None") -> None:
        self._scheduler = scheduler
        self._tiers = tiers
        self._still_since_s: float | None = None
        self._watched_s = 0.0
        self._num_waiting = 0
        self._is_trial = False
        self.lets_all_through = False
        """In order of arrival, in the steps to come."""

    def watch(self, output: "SchedulerOutput", num_waiting: int, now: float) -> None:
        """A step was built while `num_waiting` turns waited for a place. Raises Stalled."""
        scheduler = self._scheduler
        is_paused = scheduler.pause_state != PauseState.UNPAUSED
        # A turn whose KV is being loaded is in neither list.
        is_placed = len(scheduler.kv_holding_waiting) > scheduler.num_waiting_for_streaming_input
        loads = is_placed or (self._tiers is not None and self._tiers.is_loading(now))
        moves = output.num_scheduled_tokens or scheduler.running or loads or is_paused
        was_idle = now - self._watched_s >= STALLED_S / 2  # an engine with something to do takes steps
        self._watched_s, is_trial, self._is_trial = now, self._is_trial, False
        if is_trial and (output.num_scheduled_tokens or is_placed):
            raise Stalled(f"{self._num_waiting} turns waited and nothing was scheduled for {STALLED_S:.0f} s")
        if moves or not num_waiting:
            self._still_since_s, self.lets_all_through = None, False
        elif self._still_since_s is None or was_idle:
            self._still_since_s = now
        elif not self.lets_all_through and now - self._still_since_s >= STALLED_S:
            self.lets_all_through = self._is_trial = True
            self._num_waiting = num_waiting
            logger.warning(
                "impala: %d turns wait and nothing was scheduled for %.0f s: all are let through, in order of arrival",
                num_waiting,
                STALLED_S,
            )

"""What it takes an engine to decide, beyond what vLLM's own scheduler takes: nothing, unless it is asked for.

An engine that schedules ahead hides it behind the step that runs; here every step is longer by it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Charge:
    """Seconds of the engine loop."""

    step_s: float = 0.0
    """A step for which nobody waits."""
    waiting_step_s: float = 0.0
    """A step for which somebody waits, so that turns are ranked and admitted."""
    tiers_step_s: float = 0.0
    """On top of it, where there are tiers below HBM."""
    new_token_s: float = 0.0
    """The tiers' manager, for each prompt token computed."""
    found_token_s: float = 0.0
    """The same for each that a turn finds when it is placed."""

    def step(self, num_new: int, num_found: int, is_waited_for: bool, has_tiers: bool) -> float:
        """Of one step with so many prompt tokens."""
        took_s = self.waiting_step_s if is_waited_for else self.step_s
        if has_tiers:
            took_s += self.tiers_step_s if is_waited_for else 0.0
            took_s += num_new * self.new_token_s + num_found * self.found_token_s
        return took_s


FREE = Charge()

MEASURED = Charge(4.2e-6, 174e-6, 360e-6, 34.1e-3 / 118_000, 5.7e-3 / 118_000)
"""Of impala: micro/plan_cost with none and with 200 turns waiting, micro/tiers_cost a step with turns waiting, a first
turn and a resume of 118k tokens (2 AVX2 cores, commit 35c80993a6b0, 2026-11-29)."""

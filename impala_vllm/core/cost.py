"""What compute costs on this engine, learned from its own steps.

Two rates are enough for policy: seconds to prefill one more token, as a function of how much context
stands before it, and seconds a decode step takes. Both start from a prior and follow the engine.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CostConfig:
    """Priors and memory of the step-cost estimate."""

    prefill_s_per_token: float = 1e-4
    """10k tokens/s, a large model on one GPU; replaced after a few steps."""
    decode_s_per_step: float = 0.02
    """A step that only decodes; replaced after the first one."""
    memory: float = 200.0
    """Steps after which an observation's weight has fallen to 1/e."""
    min_prefill_tokens: int = 64
    """Steps with fewer prompt tokens say little of the prefill rate."""


class StepCost:
    """Running estimate of prefill and decode cost. One writer; O(1) a step.

    A prefill token's cost is modelled as `a + b * context`: attention makes late tokens dearer. The pair is
    the exponentially weighted least-squares fit of step seconds on (tokens, tokens * mean context), kept
    non-negative; decode-only steps give the fixed part, which is taken off first.
    """

    def __init__(self, config: CostConfig | None = None) -> None:
        self.config = config or CostConfig()
        self._keep = 1.0 - 1.0 / self.config.memory
        self.decode_s = self.config.decode_s_per_step
        self._a = self.config.prefill_s_per_token
        self._b = 0.0
        # Normal equations of the fit, weighted: [xx, xy, yy] of the regressors and their products with seconds.
        self._xx = self._xy = self._yy = self._xs = self._ys = 0.0
        self._num_decode_steps = 0

    def observe(self, step_s: float, prefill_tokens: int, mean_context: float) -> None:
        """A step took `step_s` and computed `prefill_tokens` of prompts, `mean_context` tokens before each."""
        if step_s <= 0.0:
            return
        if prefill_tokens == 0:
            self.observe_decodes(step_s, 1)
        elif prefill_tokens >= self.config.min_prefill_tokens:
            fixed_s = self.decode_s if self._num_decode_steps else 0.0
            self._fit(float(prefill_tokens), prefill_tokens * mean_context, max(step_s - fixed_s, 0.1 * step_s))

    def observe_decodes(self, step_s: float, count: int) -> None:
        """`count` steps that only decoded took `step_s` each. O(memory) at most."""
        if step_s <= 0.0:
            return
        while count and (1.0 - self._keep) * (self._num_decode_steps + 1) < 1.0:  # a plain mean of the first ones
            self._num_decode_steps += 1
            self.decode_s += (step_s - self.decode_s) / self._num_decode_steps
            count -= 1
        self._num_decode_steps += count
        self.decode_s = step_s + (self.decode_s - step_s) * self._keep**count

    def prefill_s(self, num_tokens: int, cached_tokens: int = 0) -> float:
        """Seconds to compute `num_tokens` prompt tokens of which the first `cached_tokens` are there already."""
        fresh = max(0, num_tokens - cached_tokens)
        return fresh * (self._a + self._b * (cached_tokens + 0.5 * fresh))

    def _fit(self, x: float, y: float, seconds: float) -> None:
        keep = self._keep
        self._xx = keep * self._xx + x * x
        self._xy = keep * self._xy + x * y
        self._yy = keep * self._yy + y * y
        self._xs = keep * self._xs + x * seconds
        self._ys = keep * self._ys + y * seconds
        determinant = self._xx * self._yy - self._xy * self._xy
        if determinant > 1e-3 * self._xx * self._yy:
            a = (self._xs * self._yy - self._ys * self._xy) / determinant
            b = (self._ys * self._xx - self._xs * self._xy) / determinant
            if a > 0.0 and b >= 0.0:
                self._a, self._b = a, b
                return
        # Too alike to tell the two apart, or noise: charge everything to the token itself.
        self._a, self._b = self._xs / self._xx, 0.0

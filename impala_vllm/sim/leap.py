"""Steps of a replica that are alike, taken as one event.

They differ by a fixed growth of their time only: all decode, but for one whose prompt goes on chunk by chunk.
"""

from impala_vllm.sim.request import Request


class Leap:
    """So many steps, from `start_s` to `end_s`; it may become shorter."""

    __slots__ = ("_growth_s", "_step_s", "end_s", "num_steps", "prompt", "scheduled", "start_s")

    def __init__(
        self,
        start_s: float,
        step_s: float,
        growth_s: float,
        num_steps: int,
        scheduled: list[tuple[Request, int]],
        prompt: tuple[int, int] | None,
    ) -> None:
        """`prompt`: tokens in a step, and those before the first one's."""
        self.start_s = start_s
        self._step_s = step_s
        self._growth_s = growth_s
        self.scheduled = scheduled
        self.prompt = prompt
        self.num_steps = num_steps
        self.end_s = self._after_s(num_steps)

    def step_s(self, index: int) -> float:
        """How long one of its steps takes."""
        return self._step_s + index * self._growth_s

    def cut(self, now: float) -> bool:
        """End with the step that runs at `now`. False: it ends with that one anyway."""
        low, high = 1, self.num_steps
        while low < high:
            middle = (low + high) // 2
            if self._after_s(middle) >= now:
                high = middle
            else:
                low = middle + 1
        is_shorter = low < self.num_steps
        self.num_steps, self.end_s = low, self._after_s(low)
        return is_shorter

    def _after_s(self, count: int) -> float:
        return self.start_s + count * self._step_s + 0.5 * self._growth_s * count * (count - 1)

"""How long the engine's steps took, for what: core's costs learn from it."""

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from impala_vllm.core.cost import StepCost


class StepTimer:
    """Steps from their plan to their end. O(scheduled requests) a step."""

    def __init__(self, cost: "StepCost") -> None:
        self._cost = cost
        self._ended_s = 0.0
        self._steps: deque[tuple[int, float, int, float]] = deque(maxlen=64)

    def planned(self, output: "SchedulerOutput", now: float) -> None:
        """A step was built: note what it will compute."""
        tokens = output.num_scheduled_tokens
        if tokens and output.total_num_scheduled_tokens == len(tokens):  # it only decodes
            self._steps.append((id(output), now, 0, 0.0))
            return
        prefill = context = 0
        cached, drafts = output.scheduled_cached_reqs, output.scheduled_spec_decode_tokens
        for request_id, done in zip(
            [r.req_id for r in output.scheduled_new_reqs] + list(cached.req_ids),
            [r.num_computed_tokens for r in output.scheduled_new_reqs] + list(cached.num_computed_tokens),
            strict=True,
        ):
            count = tokens.get(request_id, 0) - len(drafts.get(request_id, ()))
            if count > 1:
                prefill += count
                context += count * (done + count // 2)
        if tokens:
            self._steps.append((id(output), now, prefill, context / prefill if prefill else 0.0))

    def ended(self, output: "SchedulerOutput", now: float) -> None:
        """A step is done. Steps overlap under async scheduling: it took from the end of the one before."""
        while self._steps and output.num_scheduled_tokens:
            number, started_s, prefill, context = self._steps.popleft()
            if number == id(output):
                self._cost.observe(now - max(started_s, self._ended_s), prefill, context)
                break
        self._ended_s = now

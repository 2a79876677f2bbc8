"""Preble's global scheduler (https://arxiv.org/abs/2407.00023), re-implemented on exact residency.

Its replication of hot prefixes and its order within a server are left out.
"""

from collections import deque
from collections.abc import Sequence

from impala_vllm.sim.routers.informed import Informed
from impala_vllm.sim.routers.peer import Ask, Machines

WINDOW_S = 180.0
UNEVEN = 2.0


class Preble(Informed):
    """More held than missed: to who holds most, the least loaded of them, unless it is twice as loaded as the lightest.

    Else to the least of: work of the last three minutes, what must be evicted times how often prompts hit, and what is
    missed.
    """

    def __init__(self, machines: Machines) -> None:
        super().__init__(machines)
        self._timing, self._capacity = machines.timing, machines.hbm_tokens
        self._sent: deque[tuple[float, int, float, int, int]] = deque()
        """When, to whom, seconds, tokens held and tokens in all."""
        self._work_s = [0.0] * len(machines.places)
        self._held_tokens = [0] * len(machines.places)
        """Computed there, up to what fits."""
        self._hit_tokens = self._all_tokens = 0

    def pick(self, ask: Ask, running: Sequence[int], now: float) -> int:
        while self._sent and self._sent[0][0] < now - WINDOW_S:
            _, number, seconds, hit, tokens = self._sent.popleft()
            self._work_s[number] -= seconds
            self._hit_tokens -= hit
            self._all_tokens -= tokens
        held = [min(blocks * ask.block_tokens, ask.num_tokens) for blocks in self.held_blocks(ask.keys)]
        most, work_s = max(held), self._work_s
        lightest = min(range(len(work_s)), key=work_s.__getitem__)
        if most > ask.num_tokens - most:
            chosen = min((i for i, tokens in enumerate(held) if tokens == most), key=work_s.__getitem__)
            if work_s[chosen] > UNEVEN * work_s[lightest] + self._cost_s(ask, 0):
                chosen = lightest
        else:
            costs = [work + self._cost_s(ask, h) for work, h in zip(work_s, held, strict=True)]
            hits = self._hit_tokens / max(1, self._all_tokens)
            for number, tokens in enumerate(self._held_tokens):
                if (over := tokens + ask.num_tokens - held[number] - self._capacity) > 0:
                    costs[number] += hits * self._timing.prefill_s(over, 0)
            chosen = min(range(len(costs)), key=costs.__getitem__)
        self._note(ask, chosen, held[chosen], now)
        return chosen

    def _note(self, ask: Ask, chosen: int, held: int, now: float) -> None:
        seconds = self._cost_s(ask, held) + ask.num_output * self._timing.step_s((), 1, ask.num_tokens)
        self._held_tokens[chosen] = min(self._capacity, self._held_tokens[chosen] + ask.num_tokens - held)
        self._work_s[chosen] += seconds
        self._hit_tokens += held
        self._all_tokens += ask.num_tokens
        self._sent.append((now, chosen, seconds, held, ask.num_tokens))

    def _cost_s(self, ask: Ask, held: int) -> float:
        return self._timing.prefill_s(ask.num_tokens - held, held)

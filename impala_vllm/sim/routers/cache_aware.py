"""sglang-router's and vllm-router's cache-aware policy (https://docs.sglang.ai/advanced_features/router.html).

Re-implemented with their default thresholds, and a memory of what each replica was sent that never forgets.
"""

from collections.abc import Sequence

from impala_vllm.fleet.places import BlockKey
from impala_vllm.sim.routers.peer import Ask, Machines, Peer

THRESHOLD = 0.5
"""Share of a prompt that has to match."""
ABSOLUTE, RELATIVE = 32, 1.0001
"""Load is uneven where the most and the least loaded are further apart than both say."""


class CacheAware(Peer):
    """The longest prefix among what was sent, unless it is short or load is uneven."""

    def __init__(self, machines: Machines) -> None:
        self._sent: list[set[BlockKey]] = [set() for _ in machines.places]

    def pick(self, ask: Ask, running: Sequence[int], now: float) -> int:
        keys = ask.keys
        low, high = min(running), max(running)
        if high - low > ABSOLUTE and high > low * RELATIVE:
            chosen = running.index(low)
        else:
            matched = [next((d for d, key in enumerate(keys) if key not in s), len(keys)) for s in self._sent]
            best = max(range(len(matched)), key=matched.__getitem__)
            smallest = min(range(len(matched)), key=lambda i: len(self._sent[i]))
            chosen = best if matched[best] > THRESHOLD * max(1, len(keys)) else smallest
        self._sent[chosen].update(keys)
        return chosen

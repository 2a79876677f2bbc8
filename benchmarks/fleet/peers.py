"""Other ways to choose a server, re-implemented from their descriptions, for fleets in virtual time.

`cache_aware` follows sglang-router and vllm-router (https://docs.sglang.ai/advanced_features/router.html), with their
default thresholds and a memory of what each server was sent that never forgets; `dynamo_cost` the cost function of
NVIDIA Dynamo's KV router (https://github.com/ai-dynamo/dynamo) and `preble` the global scheduler of Preble
(https://arxiv.org/abs/2407.00023), both on exact residency.
"""

from collections import deque
from collections.abc import Sequence
from hashlib import blake2b
from itertools import count
from typing import Protocol

from benchmarks.fleet.sessions import Step
from impala_vllm.fleet.index import MaskIndex
from impala_vllm.fleet.places import BlockKey, Replica, Tier
from impala_vllm.sim.timing import Timing


class Peer(Protocol):
    """Chooses; told of what it cannot know by itself. `session` is the truth, which only some are given."""

    def pick(self, step: Step, session: int, running: Sequence[int], now: float) -> int:
        """A server for a prompt; `running`: requests that each has been sent and has not ended."""
        ...


class RoundRobin:
    """In turn."""

    def __init__(self, num_servers: int) -> None:
        self._turn = count()
        self._num_servers = num_servers

    def pick(self, step: Step, session: int, running: Sequence[int], now: float) -> int:
        return next(self._turn) % self._num_servers


class LeastLoaded:
    """Fewest requests under way."""

    def pick(self, step: Step, session: int, running: Sequence[int], now: float) -> int:
        return min(range(len(running)), key=lambda i: running[i])


class ConsistentHash:
    """By the session's true id."""

    def pick(self, step: Step, session: int, running: Sequence[int], now: float) -> int:
        return int.from_bytes(blake2b(str(session).encode(), digest_size=8).digest()) % len(running)


class StickyLeastLoaded:
    """A session's first turn goes where least is running, the others follow it; told the true id."""

    def __init__(self) -> None:
        self._homes: dict[int, int] = {}

    def pick(self, step: Step, session: int, running: Sequence[int], now: float) -> int:
        if session not in self._homes:
            self._homes[session] = min(range(len(running)), key=lambda i: running[i])
        return self._homes[session]


class CacheAware:
    """The longest prefix among what was sent, unless it is short or load is uneven."""

    def __init__(self, num_servers: int, threshold: float = 0.5, absolute: int = 32, relative: float = 1.0001) -> None:
        self._sent: list[set[BlockKey]] = [set() for _ in range(num_servers)]
        self._threshold, self._absolute, self._relative = threshold, absolute, relative

    def pick(self, step: Step, session: int, running: Sequence[int], now: float) -> int:
        keys = step.keys
        low, high = min(running), max(running)
        if high - low > self._absolute and high > low * self._relative:
            chosen = running.index(low)
        else:
            matched = [next((d for d, key in enumerate(keys) if key not in s), len(keys)) for s in self._sent]
            best = max(range(len(matched)), key=lambda i: matched[i])
            smallest = min(range(len(matched)), key=lambda i: len(self._sent[i]))
            chosen = best if matched[best] > self._threshold * max(1, len(keys)) else smallest
        self._sent[chosen].update(keys)
        return chosen


class Informed:
    """Told what every server holds, as its events say."""

    def __init__(self, index: MaskIndex, replicas: Sequence[Replica]) -> None:
        self._index = index
        self._replicas = replicas


class DynamoCost(Informed):
    """Blocks to compute, those in the queue among them, and blocks that decode."""

    def __init__(self, index: MaskIndex, replicas: Sequence[Replica]) -> None:
        super().__init__(index, replicas)
        self.prefill_blocks = [0] * len(replicas)
        self.active_blocks = [0] * len(replicas)

    def pick(self, step: Step, session: int, running: Sequence[int], now: float) -> int:
        keys = step.keys
        depths = self._index.prefixes(keys)

        def cost(server: int) -> int:
            found = depths.get(self._replicas[server])
            new = len(keys) - (found.hbm if found is not None else 0)
            return new + self.prefill_blocks[server] + self.active_blocks[server] + len(keys)

        return min(range(len(self._replicas)), key=lambda i: (cost(i), running[i]))


class Preble(Informed):
    """More held than missed: to who holds most, the least loaded of them, unless it is twice as loaded as the lightest.

    Else to the least of: work of the last three minutes, what must be evicted times how often prompts hit, and what is
    missed. Its replication of hot prefixes and its order within a server are left out.
    """

    def __init__(
        self,
        index: MaskIndex,
        replicas: Sequence[Replica],
        timing: Timing,
        window_s: float = 180.0,
        uneven: float = 2.0,
    ) -> None:
        super().__init__(index, replicas)
        self._timing, self._window_s, self._uneven = timing, window_s, uneven
        self._sent: deque[tuple[float, int, float, int, int]] = deque()
        """When, to whom, seconds, tokens held and tokens in all."""
        self._work_s = [0.0] * len(replicas)
        self._held_tokens = [0] * len(replicas)
        """Computed there, up to what fits."""
        self._hit_tokens = self._all_tokens = 0

    def pick(self, step: Step, session: int, running: Sequence[int], now: float) -> int:
        while self._sent and self._sent[0][0] < now - self._window_s:
            _, server, seconds, hit, tokens = self._sent.popleft()
            self._work_s[server] -= seconds
            self._hit_tokens -= hit
            self._all_tokens -= tokens
        found = self._index.prefixes(step.keys)
        held = [min(found[r].hbm * step.block_tokens, step.num_tokens) if r in found else 0 for r in self._replicas]
        most, work_s = max(held), self._work_s
        lightest = min(range(len(work_s)), key=work_s.__getitem__)
        if most > step.num_tokens - most:
            chosen = min((i for i, tokens in enumerate(held) if tokens == most), key=work_s.__getitem__)
            if work_s[chosen] > self._uneven * work_s[lightest] + self._cost_s(step, 0):
                chosen = lightest
        else:
            costs = [work + self._cost_s(step, h) for work, h in zip(work_s, held, strict=True)]
            hits, capacity = self._hit_tokens / max(1, self._all_tokens), self._timing.hbm_tokens
            for server, tokens in enumerate(self._held_tokens):
                if (over := tokens + step.num_tokens - held[server] - capacity) > 0:
                    costs[server] += hits * self._timing.prefill_s(over, 0)
            chosen = min(range(len(costs)), key=costs.__getitem__)
        missed = step.num_tokens - held[chosen]
        seconds = self._cost_s(step, held[chosen]) + step.num_output * self._timing.step_s((), 1, step.num_tokens)
        self._held_tokens[chosen] = min(self._timing.hbm_tokens, self._held_tokens[chosen] + missed)
        self._work_s[chosen] += seconds
        self._hit_tokens += held[chosen]
        self._all_tokens += step.num_tokens
        self._sent.append((now, chosen, seconds, held[chosen], step.num_tokens))
        return chosen

    def _cost_s(self, step: Step, held: int) -> float:
        return self._timing.prefill_s(step.num_tokens - held, held)


def stored(index: MaskIndex, replica: Replica, new: Sequence[BlockKey], gone: Sequence[BlockKey], now: float) -> None:
    """An engine's events, into an index."""
    if new:
        index.store(replica, Tier.HBM, new, now)
    if gone:
        index.remove(replica, Tier.HBM, gone)

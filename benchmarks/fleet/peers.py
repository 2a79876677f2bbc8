"""Other ways to choose a server, re-implemented from their descriptions, for fleets in virtual time.

`cache_aware` follows sglang-router and vllm-router (https://docs.sglang.ai/advanced_features/router.html), with their
default thresholds and a memory of what each server was sent that never forgets; `dynamo_cost` the cost function of
NVIDIA Dynamo's KV router (https://github.com/ai-dynamo/dynamo), on exact residency.
"""

from collections.abc import Sequence
from hashlib import blake2b
from itertools import count
from typing import Protocol

from impala_vllm.fleet.index import MaskIndex
from impala_vllm.fleet.places import BlockKey, Replica, Tier


class Peer(Protocol):
    """Chooses; told of what it cannot know by itself. `session` is the truth, which only some are given."""

    def pick(self, keys: Sequence[BlockKey], session: int, running: Sequence[int]) -> int:
        """A server for a prompt; `running`: requests that each has been sent and has not ended."""
        ...


class RoundRobin:
    """In turn."""

    def __init__(self, num_servers: int) -> None:
        self._turn = count()
        self._num_servers = num_servers

    def pick(self, keys: Sequence[BlockKey], session: int, running: Sequence[int]) -> int:
        return next(self._turn) % self._num_servers


class LeastLoaded:
    """Fewest requests under way."""

    def pick(self, keys: Sequence[BlockKey], session: int, running: Sequence[int]) -> int:
        return min(range(len(running)), key=lambda i: running[i])


class ConsistentHash:
    """By the session's true id."""

    def pick(self, keys: Sequence[BlockKey], session: int, running: Sequence[int]) -> int:
        return int.from_bytes(blake2b(str(session).encode(), digest_size=8).digest()) % len(running)


class StickyLeastLoaded:
    """A session's first turn goes where least is running, the others follow it; told the true id."""

    def __init__(self) -> None:
        self._homes: dict[int, int] = {}

    def pick(self, keys: Sequence[BlockKey], session: int, running: Sequence[int]) -> int:
        if session not in self._homes:
            self._homes[session] = min(range(len(running)), key=lambda i: running[i])
        return self._homes[session]


class CacheAware:
    """The longest prefix among what was sent, unless it is short or load is uneven."""

    def __init__(self, num_servers: int, threshold: float = 0.5, absolute: int = 32, relative: float = 1.0001) -> None:
        self._sent: list[set[BlockKey]] = [set() for _ in range(num_servers)]
        self._threshold, self._absolute, self._relative = threshold, absolute, relative

    def pick(self, keys: Sequence[BlockKey], session: int, running: Sequence[int]) -> int:
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


class DynamoCost:
    """Blocks to compute, those in the queue among them, and blocks that decode."""

    def __init__(self, index: MaskIndex, replicas: Sequence[Replica]) -> None:
        self._index = index
        self._replicas = replicas
        self.prefill_blocks = [0] * len(replicas)
        self.active_blocks = [0] * len(replicas)

    def pick(self, keys: Sequence[BlockKey], session: int, running: Sequence[int]) -> int:
        depths = self._index.prefixes(keys)

        def cost(server: int) -> int:
            found = depths.get(self._replicas[server])
            new = len(keys) - (found.hbm if found is not None else 0)
            return new + self.prefill_blocks[server] + self.active_blocks[server] + len(keys)

        return min(range(len(self._replicas)), key=lambda i: (cost(i), running[i]))


def stored(index: MaskIndex, replica: Replica, new: Sequence[BlockKey], gone: Sequence[BlockKey], now: float) -> None:
    """An engine's events, into an index."""
    if new:
        index.store(replica, Tier.HBM, new, now)
    if gone:
        index.remove(replica, Tier.HBM, gone)

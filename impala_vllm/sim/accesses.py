"""How many blocks a run did not find in HBM, and how many Belady's MIN would have missed in the same order and room.

What runs is given: at any time MIN has for idle blocks what the run had free, which leaves out what policy pins. It
knows every later lookup, and gives up the block that is looked up last, of one chain the deepest first (Belady 1966).
"""

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class _Event(NamedTuple):
    """Keys were looked up, filled, or let go by whoever ran on them."""

    verb: str
    keys: Sequence[int]
    num_found: int
    """Leading ones, of a lookup."""
    num_free: int
    """Blocks nobody references, after it."""


class Accesses:
    """Told by a replica without tiers, in order. Keeps every event: O(blocks of all turns)."""

    def __init__(self) -> None:
        self._events: list[_Event] = []
        self.num_looked_up = self.num_missed = 0

    def looked_up(self, keys: Sequence[int], num_found: int, num_free: int) -> None:
        """A turn got its place and runs on the first `num_found` of these from now on."""
        self.num_looked_up += len(keys)
        self.num_missed += len(keys) - num_found
        self._events.append(_Event("look", keys, num_found, num_free))

    def filled(self, keys: Sequence[int], num_free: int) -> None:
        """A running turn has computed these blocks."""
        self._events.append(_Event("fill", keys, 0, num_free))

    def let_go(self, keys: Sequence[int], num_free: int) -> None:
        """A turn runs no longer on these, root first."""
        self._events.append(_Event("release", keys, 0, num_free))

    def fewest_missed(self) -> int:
        """Lookups that even MIN answers with nothing; those of blocks that never were there included."""
        return _Min(self._events).missed()


class _Min:
    def __init__(self, events: Sequence[_Event]) -> None:
        self._events = events
        self._uses: dict[int, list[int]] = {}
        """Lookups of each key that are still to come, the next one last."""
        for number in range(len(events) - 1, -1, -1):
            if events[number].verb == "look":
                for key in events[number].keys:
                    self._uses.setdefault(key, []).append(number)
        self._held: Counter[int] = Counter()
        self._idle: dict[int, tuple[float, int]] = {}
        """Next use and depth of each idle block."""
        self._heap: list[tuple[float, int, int]] = []
        """The same, negated, with the key; what no longer holds is skipped."""
        self._depth: dict[int, int] = {}

    def missed(self) -> int:
        missed = 0
        for event in self._events:
            if event.verb == "look":
                missed += self._look(event)
            elif event.verb == "fill":
                self._hold(event.keys)
            else:
                self._release(event.keys)
            self._shrink(event.num_free)
        return missed

    def _look(self, event: _Event) -> int:
        there = next((i for i, k in enumerate(event.keys) if not (k in self._held or k in self._idle)), len(event.keys))
        for depth, key in enumerate(event.keys):
            self._uses[key].pop()
            self._depth[key] = depth
            if key in self._idle:
                self._add(key)
        self._hold(event.keys[: event.num_found])
        return len(event.keys) - there

    def _hold(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._idle.pop(key, None)
            self._held[key] += 1

    def _release(self, keys: Sequence[int]) -> None:
        for depth, key in enumerate(keys):
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]
                self._depth[key] = depth
                self._add(key)

    def _add(self, key: int) -> None:
        uses = self._uses.get(key)
        worth = (-uses[-1] if uses else -math.inf, -self._depth[key])
        self._idle[key] = worth
        heapq.heappush(self._heap, (*worth, key))

    def _shrink(self, room: int) -> None:
        while len(self._idle) > room:
            use, depth, key = heapq.heappop(self._heap)
            if self._idle.get(key) == (use, depth):
                del self._idle[key]

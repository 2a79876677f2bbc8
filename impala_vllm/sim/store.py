"""One tier's blocks by key: which are ready, which are on their way, and which may go.

What goes is decided elsewhere: by policy, or by `LruStore` in vLLM's order.
"""

import heapq
from collections.abc import Callable, Collection, Iterable, Sequence


class Store:
    """At most `num_blocks`. Pinned ones and those under way stay."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._pins: dict[int, int] = {}
        """By ready block."""
        self._filling: set[int] = set()
        self._num_pinned = 0
        self.on_change: Callable[[Sequence[int], Sequence[int]], None] | None = None
        """Told which blocks can be read from now on, and which are gone."""

    def __len__(self) -> int:
        return len(self._pins) + len(self._filling)

    def __contains__(self, key: object) -> bool:
        return key in self._pins or key in self._filling

    @property
    def num_free(self) -> int:
        return self.num_blocks - len(self)

    @property
    def num_evictable(self) -> int:
        return len(self._pins) - self._num_pinned

    @property
    def ready(self) -> Collection[int]:
        """Blocks that may be read. To look at."""
        return self._pins

    def is_ready(self, key: int) -> bool:
        return key in self._pins

    def may_go(self, key: int) -> bool:
        """Ready, and nobody reads it."""
        return self._pins.get(key) == 0

    def reserve(self, keys: Sequence[int]) -> None:
        """Places for blocks that are not here; there must be so many free."""
        assert len(keys) <= self.num_free, "more blocks reserved than there is room for"
        self._filling.update(keys)

    def commit(self, keys: Iterable[int]) -> None:
        """The bytes of reserved blocks are there."""
        there = list(keys)
        for key in there:
            self._filling.remove(key)
            self._pins[key] = 0
        if self.on_change is not None:
            self.on_change(there, ())

    def evict(self, keys: Iterable[int]) -> None:
        """Forget blocks that may go."""
        gone = list(keys)
        for key in gone:
            assert self._pins.pop(key) == 0, "a block was evicted that is being read"
        if self.on_change is not None:
            self.on_change((), gone)

    def pin(self, keys: Iterable[int]) -> None:
        """Ready blocks are being read."""
        for key in keys:
            self._num_pinned += self._pins[key] == 0
            self._pins[key] += 1

    def unpin(self, keys: Iterable[int]) -> None:
        for key in keys:
            self._pins[key] -= 1
            self._num_pinned -= self._pins[key] == 0

    def check_invariants(self) -> None:
        """Raise AssertionError where there is too much. O(n), for tests."""
        assert len(self) <= self.num_blocks
        assert not self._filling.intersection(self._pins)
        assert self._num_pinned == sum(count > 0 for count in self._pins.values())


class LruStore(Store):
    """vLLM's `LRUCachePolicy`: a block is used when it gets its place and when a turn that used it ends."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._used: dict[int, int] = {}
        self._num_uses = 0
        self._heap: list[tuple[int, int]] = []
        """(when used, block); what was used or read since is skipped."""

    def make_room(self, count: int, spared: Collection[int] = ()) -> bool:
        """Have `count` places free, at the cost of what was used longest ago. False: nothing changed."""
        lacking = count - self.num_free
        if lacking <= 0:
            return True
        if lacking > self.num_evictable:
            return False
        found: list[tuple[int, int]] = []
        passed: list[tuple[int, int]] = []
        while self._heap and len(found) < lacking:
            entry = heapq.heappop(self._heap)
            used, key = entry
            if self._used.get(key) == used and self.may_go(key) and (not found or entry != found[-1]):
                (passed if key in spared else found).append(entry)
        is_enough = len(found) == lacking
        for entry in passed if is_enough else passed + found:
            heapq.heappush(self._heap, entry)
        if is_enough:
            self.evict(key for _, key in found)
        return is_enough

    def touch(self, keys: Sequence[int]) -> None:
        """A chain was used, its root last: it loses its tail first. Blocks that are not here do not mind."""
        for key in reversed(keys):
            if key in self:
                self._use(key)
                if self.may_go(key):
                    heapq.heappush(self._heap, (self._used[key], key))
        if len(self._heap) > 2 * len(self) + 64:
            self._heap = [(self._used[k], k) for k, pins in self._pins.items() if not pins]
            heapq.heapify(self._heap)

    def reserve(self, keys: Sequence[int]) -> None:
        super().reserve(keys)
        for key in keys:
            self._use(key)

    def commit(self, keys: Iterable[int]) -> None:
        listed = list(keys)
        super().commit(listed)
        self._list(listed)

    def unpin(self, keys: Iterable[int]) -> None:
        listed = list(keys)
        super().unpin(listed)
        self._list(listed)

    def evict(self, keys: Iterable[int]) -> None:
        listed = list(keys)
        super().evict(listed)
        for key in listed:
            del self._used[key]

    def _use(self, key: int) -> None:
        self._num_uses += 1
        self._used[key] = self._num_uses

    def _list(self, keys: Iterable[int]) -> None:
        for key in keys:
            if self.may_go(key):
                heapq.heappush(self._heap, (self._used[key], key))

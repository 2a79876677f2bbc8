"""HBM of one replica, block by block: who references what, and which KV can still be found.

As vLLM keeps it: full blocks are found by their key, may exist twice, and stay findable until somebody else
needs the room.
"""

from collections.abc import Callable, Sequence

from impala_vllm.sim.eviction import Order


class Pool:
    """`num_blocks` blocks. `idle` decides which unreferenced block goes first."""

    def __init__(self, num_blocks: int, idle: Order) -> None:
        self.num_blocks = num_blocks
        self.idle = idle
        self._num_fresh = num_blocks
        self._blank: list[int] = []
        self._refs: list[int] = []
        self._key: list[int | None] = []
        self._found: dict[int, int] = {}
        self._twins: dict[int, list[int]] = {}
        self.num_evicted = 0
        """Blocks whose KV was given up for others."""
        self.on_change: Callable[[Sequence[int], Sequence[int]], None] | None = None
        """Told the keys of blocks that can be found from now on, and of those that are gone; once a block."""

    @property
    def num_blank(self) -> int:
        """Free blocks without KV: taking them costs nothing."""
        return self._num_fresh + len(self._blank)

    @property
    def num_free(self) -> int:
        """Blocks nobody references."""
        return self._num_fresh + len(self._blank) + len(self.idle)

    def find(self, keys: Sequence[int], limit: int) -> list[int]:
        """The leading blocks of a chain that are here, at most `limit`."""
        found = self._found
        hits: list[int] = []
        for key in keys[:limit]:
            block = found.get(key)
            if block is None:
                break
            hits.append(block)
        return hits

    def has(self, key: int) -> bool:
        return key in self._found

    def is_referenced(self, key: int) -> bool:
        """Whether somebody runs on the block with this key."""
        block = self._found.get(key)
        return block is not None and self._refs[block] > 0

    def num_idle_of(self, blocks: Sequence[int]) -> int:
        """How many of the blocks nobody references."""
        refs = self._refs
        return sum(not refs[b] for b in blocks)

    def touch(self, blocks: Sequence[int]) -> None:
        """Reference cached blocks once more."""
        for block in blocks:
            if not self._refs[block]:
                self.idle.remove(block)
            self._refs[block] += 1

    def take(self, count: int) -> list[int]:
        """`count` blocks without KV, referenced once. At least so many must be free."""
        assert count <= self.num_free, "more blocks taken than are free"
        taken: list[int] = []
        while len(taken) < count and self._blank:
            taken.append(self._blank.pop())
        fresh = min(count - len(taken), self._num_fresh)
        if fresh:
            first = len(self._refs)
            taken += range(first, first + fresh)
            self._refs += [0] * fresh
            self._key += [None] * fresh
            self._num_fresh -= fresh
        if len(taken) < count:
            lost = self.idle.pop(count - len(taken))
            self._forget(lost)
            self.num_evicted += len(lost)
            taken += lost
        for block in taken:
            self._refs[block] = 1
        return taken

    def cache(self, blocks: Sequence[int], keys: Sequence[int]) -> None:
        """The blocks are full and from now on found by their keys."""
        for block, key in zip(blocks, keys, strict=True):
            self._key[block] = key
            if key in self._found:
                self._twins.setdefault(key, []).append(block)
            else:
                self._found[key] = block
        if self.on_change is not None:
            self.on_change(keys, ())

    def release(self, blocks: Sequence[int], owner: str | None = None, num_stem: int = 0) -> None:
        """Reference the blocks of a chain, root first, once less. The first `num_stem` are shared with others."""
        refs, keys = self._refs, self._key
        idle: list[int] = []
        for block in reversed(blocks):
            refs[block] -= 1
            if not refs[block]:
                if keys[block] is None:
                    self._blank.append(block)
                else:
                    idle.append(block)
        if idle:
            self.idle.add(idle, owner, frozenset(blocks[:num_stem]))

    def check_invariants(self) -> None:
        """Raise AssertionError if counts disagree. O(blocks), for tests."""
        assert len(self._refs) + self._num_fresh == self.num_blocks
        unreferenced = sum(not r for r in self._refs)
        assert unreferenced == len(self._blank) + len(self.idle)
        assert all(self._key[b] is None and not self._refs[b] for b in self._blank)
        assert all(self._key[block] == key for key, block in self._found.items())
        cached = sum(key is not None for key in self._key)
        assert cached == len(self._found) + sum(map(len, self._twins.values()))

    def _forget(self, blocks: Sequence[int]) -> None:
        keys, found, twins_of = self._key, self._found, self._twins
        if self.on_change is not None:
            self.on_change((), [key for block in blocks if (key := keys[block]) is not None])
        for block in blocks:
            key = keys[block]
            assert key is not None
            keys[block] = None
            twins = twins_of.get(key) if twins_of else None
            if twins is None:
                del found[key]
                continue
            if found[key] == block:
                found[key] = twins.pop(0)
            else:
                twins.remove(block)
            if not twins:
                del twins_of[key]

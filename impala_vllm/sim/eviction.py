"""In which order idle cached blocks go: least recently used, or trace by trace.

Blocks are those nobody references and whose KV can still be found; what is free of charge the pool takes first.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol


class Order(Protocol):
    """The idle cached blocks of a pool."""

    def __len__(self) -> int: ...

    def add(self, blocks: Sequence[int], owner: str | None, stem: frozenset[int]) -> None:
        """Blocks became idle, the tail of a chain first. `stem`: those among them that others share."""
        ...

    def remove(self, block: int) -> None:
        """The block is used again."""
        ...

    def pop(self, count: int) -> list[int]:
        """Give up `count` blocks, at most all, whose KV is lost."""
        ...


class Lru:
    """vLLM's own order."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, blocks: Sequence[int], owner: str | None, stem: frozenset[int]) -> None:
        self._blocks.update(dict.fromkeys(blocks))

    def remove(self, block: int) -> None:
        del self._blocks[block]

    def pop(self, count: int) -> list[int]:
        return [self._blocks.popitem(last=False)[0] for _ in range(count)]


class ByTrace:
    """Blocks nobody claims first, then trace by trace as `victims` says, each from its tail; shared stems last.

    A stem that was idle before every chain that is left is nobody's: whoever goes on from it had used it since.
    `victims` orders traces, cheapest first. It is asked once a round; `new_round` ends one.
    """

    def __init__(self, victims: Callable[[Iterable[str]], list[str]]) -> None:
        self._victims = victims
        self._unclaimed: OrderedDict[int, None] = OrderedDict()
        self._stems: OrderedDict[int, int] = OrderedDict()
        """And when they were added."""
        self._idle_since: OrderedDict[str, int] = OrderedDict()
        """Traces by when blocks of theirs were added last, some of them without any by now."""
        self._num_added = 0
        self._chains: dict[str, OrderedDict[int, None]] = {}
        self._owner: dict[int, str] = {}
        self._round: list[str] = []
        self._spared: set[str] = set()
        self._num = 0
        self.changed: dict[str, None] = {}
        """Traces whose idle blocks became more or fewer, in that order; the reader clears it."""

    def __len__(self) -> int:
        return self._num

    @property
    def num_unclaimed(self) -> int:
        return len(self._unclaimed)

    def num_claimed(self, trace: str) -> int:
        """Idle blocks of one trace, stems apart."""
        return len(self._chains.get(trace, ()))

    def add(self, blocks: Sequence[int], owner: str | None, stem: frozenset[int]) -> None:
        self._num += len(blocks)
        self._num_added += 1
        if owner is None:
            self._unclaimed.update(dict.fromkeys(blocks))
            return
        own = [b for b in blocks if b not in stem] if stem else blocks
        if own:
            self._chains.setdefault(owner, OrderedDict()).update(dict.fromkeys(own))
            self._owner.update(dict.fromkeys(own, owner))
            self.changed[owner] = None
            self._idle_since[owner] = self._num_added
            self._idle_since.move_to_end(owner)
        if len(own) < len(blocks):
            self._stems.update((b, self._num_added) for b in blocks if b in stem)

    def remove(self, block: int) -> None:
        self._num -= 1
        owner = self._owner.pop(block, None)
        if owner is not None:
            del self._chains[owner][block]
            self.changed[owner] = None
        elif block in self._unclaimed:
            del self._unclaimed[block]
        else:
            del self._stems[block]

    def pop(self, count: int) -> list[int]:
        self._num -= count
        taken = [self._unclaimed.popitem(last=False)[0] for _ in range(min(count, len(self._unclaimed)))]
        if len(taken) < count:
            self._release_stems()
            more = min(count - len(taken), len(self._unclaimed))
            taken += [self._unclaimed.popitem(last=False)[0] for _ in range(more)]
        while len(taken) < count:
            owner = self._next_owner()
            chain = self._stems if owner is None else self._chains[owner]
            for _ in range(min(count - len(taken), len(chain))):
                block, _ = chain.popitem(last=False)
                taken.append(block)
                if owner is not None:
                    del self._owner[block]
            if owner is not None:
                self.changed[owner] = None
        return taken

    def release(self, trace: str) -> None:
        """The trace is over: its idle blocks are nobody's."""
        chain = self._chains.pop(trace, None)
        if chain is None:
            return
        for block in chain:
            del self._owner[block]
        self._unclaimed.update(chain)
        self.changed[trace] = None

    def new_round(self) -> None:
        """Worth has changed: ask `victims` again when it comes to that."""
        self._round = []
        self._spared.clear()

    def spare(self, trace: str) -> None:
        """Pass the trace over until the order is asked for again."""
        self._spared.add(trace)

    def check_invariants(self) -> None:
        """Raise AssertionError if lists and counts disagree. O(n), for tests."""
        lists = [self._unclaimed, self._stems, *self._chains.values()]
        blocks = [b for found in lists for b in found]
        assert len(blocks) == len(set(blocks)) == self._num
        assert all(self._owner[b] == trace for trace, chain in self._chains.items() for b in chain)
        assert len(self._owner) == sum(map(len, self._chains.values()))

    def _release_stems(self) -> None:
        since = self._idle_since
        while since and not self._chains.get(next(iter(since))):
            since.popitem(last=False)
        first = next(iter(since.values()), self._num_added)
        while self._stems and next(iter(self._stems.values())) < first:
            self._unclaimed[self._stems.popitem(last=False)[0]] = None

    def _next_owner(self) -> str | None:
        while True:
            if not self._round:
                for trace in [t for t, chain in self._chains.items() if not chain]:
                    del self._chains[trace]
                self._spared.clear()
                self._round = list(reversed(self._victims(self._chains)))
                if not self._round:
                    return None
            trace = self._round[-1]
            if self._chains.get(trace) and trace not in self._spared:
                return trace
            self._round.pop()

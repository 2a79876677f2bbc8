"""Which chunks of a tier go first: nobody's, then the traces that are worth least, shared stems last.

Every chunk of the tier is in one list: unclaimed (least recently used first), a chain of a trace, or the stems. What
was used together goes tail first, so that no island is left. What a new turn of the same chain no longer uses is
superseded and unclaimed at once. Choosing changes nothing. One writer.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice

from impala_vllm.core.allocator import Key
from impala_vllm.core.types import TraceId
from impala_vllm.core.worth_order import WorthOrder

MAX_CHAINS = 4
"""Conversations of one trace that are told apart; the one silent longest is released beyond that."""

STEM_SHARE = 0.5
"""Stems beyond this share of the tier go first, least recently used: what forks once shared adds up."""

_List = dict[Key, None]


class Chains:
    """The lists. `num_chunks` is the tier's size, `worth` says what a trace's KV in it is worth."""

    def __init__(self, num_chunks: int, worth: Callable[[TraceId], float]) -> None:
        self.supersedes = True
        """What a new turn of a chain no longer uses is nobody's; off, for comparison: it stays behind the chain."""
        self._max_stems = int(STEM_SHARE * num_chunks)
        self._order = WorthOrder(worth)
        self._home: dict[Key, _List] = {}
        self._unclaimed: _List = {}
        self._stems: _List = {}
        self._chains: dict[TraceId, list[_List]] = {}
        """The chain used last comes last."""
        self._of: dict[int, TraceId] = {}
        """Trace by the identity of its list."""

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, key: object) -> bool:
        return key in self._home

    def num_of(self, trace_id: TraceId) -> int:
        """Chunks that only this trace uses."""
        return sum(len(chain) for chain in self._chains.get(trace_id, ()))

    def trace_of(self, key: Key) -> TraceId | None:
        """Whose chunk it is; None: nobody's, or shared."""
        return self._of.get(id(self._home.get(key)))

    def add(self, keys: Sequence[Key], trace_id: TraceId | None = None) -> None:
        """Chunks, root first, that come into the tier behind what the trace's newest chain has here.

        Without a trace they are nobody's.
        """
        chains = self._chains.get(trace_id) if trace_id is not None else None
        if chains:
            if trace_id is not None and not chains[-1]:
                self._order.changed(trace_id)
            self._put_all(keys, chains[-1])
        else:
            self._put_all(keys[::-1], self._unclaimed)

    def drop(self, keys: Iterable[Key]) -> set[TraceId]:
        """Chunks that left the tier. Returns whose they were, but for nobody's and shared ones. O(keys)."""
        pop, lists = self._home.pop, set[int]()
        for key in keys:
            home = pop(key, None)
            if home is not None:
                del home[key]
                lists.add(id(home))
        return {self._of[number] for number in lists if number in self._of}

    def use(self, trace_id: TraceId, keys: Sequence[Key], stem: int = 0) -> range:
        """A turn of the trace goes over `keys`, root first; the first `stem` are shared. Those not here are skipped.

        O(keys), quick for a chain of which nothing is superseded. A chain is continued by a turn that goes over the
        first chunk it calls its own. Returns which of `keys` are known to be here then; there may be others.
        """
        self._order.changed(trace_id)
        chains = self._chains.setdefault(trace_id, [])
        first, before = self._continued(trace_id, keys, stem)
        behind = self._behind(keys, stem, first, before) if before is not None else None
        if before is not None and behind is not None:
            chain, indices, known = before, (*range(first), *range(behind, len(keys))), range(first, behind)
        else:
            is_here = not self._home.keys().isdisjoint(keys)
            chain, indices, known = _List(), range(len(keys) if is_here else 0), range(0)
            self._of[id(chain)] = trace_id
        shared: list[Key] = []
        for index in [i for i in indices if keys[i] in self._home]:
            key = keys[index]
            home = self._home[key]
            other = home is not before and self._of.get(id(home), trace_id) != trace_id
            if index < stem or home is self._stems or other:
                shared.append(key)
            else:
                self._put(key, chain)
        self._put_all(shared[::-1], self._stems)
        for old in [c for c in chains if c is not chain and (c is before or not c)]:
            if not self.supersedes:
                self._put_all(list(old), chain)
            self._let_go(old)
        chains[:] = [c for c in chains if c is not chain and id(c) in self._of]
        chains.append(chain)
        if len(chains) > MAX_CHAINS:
            self._let_go(chains.pop(0))
        return known

    def touch(self, keys: Sequence[Key]) -> None:
        """Somebody of no trace goes over `keys`, root first, some maybe twice: what is nobody's is used. O(keys)."""
        home, unclaimed = self._home, self._unclaimed
        self._put_all([key for key in reversed(dict.fromkeys(keys)) if home.get(key) is unclaimed], unclaimed)

    def release(self, trace_id: TraceId) -> None:
        """The trace is over: what was only its own goes first from now on. O(its chunks)."""
        for chain in self._chains.pop(trace_id, ()):
            self._let_go(chain)

    def release_all(self) -> None:
        """There are no traces any more. O(chunks)."""
        for trace_id in list(self._chains):
            self.release(trace_id)
        self._put_all(list(self._stems), self._unclaimed)

    def clear(self) -> None:
        """The tier is empty."""
        for held in (self._home, self._unclaimed, self._stems, self._chains, self._of):
            held.clear()
        self._order.reset()

    def victims(
        self,
        num: int,
        which_may_go: Callable[[Sequence[Key]], Sequence[Key]],
        spared: Collection[TraceId] = (),
        only_cheaper_than: TraceId | None = None,
        last: Collection[TraceId] = (),
        only_nobodys: bool = False,
    ) -> list[Key]:
        """The `num` cheapest chunks that may go, best victims first; fewer where there are no more.

        `which_may_go` names those of some chunks, in their order. Chunks of traces `spared` stay, with
        `only_cheaper_than` all that is worth as much as that trace's or more, and with `only_nobodys` all that is any
        trace's. Those of traces `last` go behind the other traces'. O(num + traces and chunks passed over), and
        traces log traces once a round.
        """
        order = itertools.chain.from_iterable(self._in_order(spared, only_cheaper_than, last, only_nobodys))
        chosen: list[Key] = []
        while len(chosen) < num and (some := list(islice(order, num - len(chosen)))):
            chosen += which_may_go(some)
        self._order.chose(len(chosen))
        return chosen

    def check_invariants(self) -> None:
        """Raise AssertionError if lists and homes disagree. O(chunks), for tests."""
        lists = [self._unclaimed, self._stems, *(c for chains in self._chains.values() for c in chains)]
        assert sum(map(len, lists)) == len(self._home)
        assert all(self._home[key] is held for held in lists for key in held)
        chains = {id(c): t for t, cs in self._chains.items() for c in cs}
        assert self._of == chains

    def _in_order(
        self, spared: Collection[TraceId], limit: TraceId | None, last: Collection[TraceId], only_nobodys: bool
    ) -> Iterator[Iterable[Key]]:
        """Runs of chunks, best victims first."""
        surplus = max(0, len(self._stems) - self._max_stems)
        yield islice(self._stems, surplus)
        yield self._unclaimed
        if only_nobodys:
            return
        limit_worth = self._order.worth(limit) if limit is not None else math.inf
        entries = self._order.cheapest_first(self._chains.keys())
        num_empty = next((i for i, (_, _, t) in enumerate(entries) if any(self._chains.get(t, ()))), len(entries))
        self._order.skip_first(num_empty)
        later: list[TraceId] = []
        for worth, _, trace_id in entries:
            if limit is not None and worth >= limit_worth:
                break
            if trace_id in last:
                later.append(trace_id)
            elif trace_id not in spared:
                yield from map(reversed, self._chains.get(trace_id, ()))
        for trace_id in later:
            if trace_id not in spared:
                yield from map(reversed, self._chains.get(trace_id, ()))
        if limit is None:
            yield islice(self._stems, surplus, None)

    def _continued(self, trace_id: TraceId, keys: Sequence[Key], stem: int) -> "tuple[int, _List | None]":
        """The first of `keys` behind the stem that a chain of the trace calls its own, and that chain."""
        if any(self._chains[trace_id]):
            for index, home in enumerate(map(self._home.get, islice(keys, stem, None)), stem):
                if home is not None and self._of.get(id(home)) == trace_id:
                    return index, home
        return len(keys), None

    def _behind(self, keys: Sequence[Key], stem: int, first: int, before: _List) -> int | None:
        """The index behind the last of `before`'s chunks; None where its list has to be made anew."""
        own = list(before)
        behind = first + len(own)
        if list(keys[first:behind]) != own or any(self._home.get(k) is self._unclaimed for k in keys[stem:first]):
            return None
        return behind

    def _let_go(self, chain: _List) -> None:
        self._put_all(list(chain)[::-1], self._unclaimed)
        del self._of[id(chain)]

    def _put_all(self, keys: Sequence[Key], target: _List) -> None:
        """In this order, each once, behind what is there."""
        home = self._home
        if not home.keys().isdisjoint(keys):
            for key in [key for key in keys if key in home]:
                del home[key][key]
        target.update(dict.fromkeys(keys))
        home.update(dict.fromkeys(keys, target))

    def _put(self, key: Key, target: _List) -> None:
        home = self._home.get(key)
        if home is not None:
            del home[key]
        target[key] = None
        self._home[key] = target

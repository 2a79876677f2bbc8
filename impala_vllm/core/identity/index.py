"""Prefix index of one namespace: which known chain a prompt follows, and how far.

A radix tree of runs of block hashes with one dict from hash to run. Block hashes are chained, so
membership is monotone along a prompt and the match is a binary search. Chains (whose they are is the
caller's business) end somewhere in a run; what no chain needs any more is forgotten.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

from impala_vllm.core.types import BlockHash

T = TypeVar("T")


class BrokenChain(ValueError):
    """The hashes are not chained, so no answer can be trusted; the index is unusable from here on."""


class Run(Generic[T]):
    """Consecutive blocks `start` to `end` below `parent`; children may branch off at any depth of it."""

    __slots__ = ("blocks", "children", "parent", "start", "starts", "tips")

    def __init__(self, parent: "Run[T] | None", start: int, blocks: list[BlockHash]) -> None:
        self.parent = parent
        self.start = start
        self.blocks = blocks
        self.children: dict[Run[T], None] = {}
        self.tips: dict[Tip[T], None] = {}
        # Dicts as ordered sets: the order of answers must not depend on addresses.
        self.starts: list[int] = []
        """Depths up to which starts of further traces shared this run, deepest first, a few."""

    @property
    def end(self) -> int:
        """Depth after the last block of the run."""
        return self.start + len(self.blocks)


class Tip(Generic[T]):
    """Where a chain ends: the first `depth` blocks down to `run`. `run` is None for an empty chain."""

    __slots__ = ("depth", "owner", "run")

    def __init__(self, owner: T) -> None:
        self.owner = owner
        self.run: Run[T] | None = None
        self.depth = 0


class Match(NamedTuple, Generic[T]):
    """Leading blocks already known, and the run that holds the last of them."""

    depth: int
    run: Run[T] | None


class Shared(NamedTuple, Generic[T]):
    """A chain near a match: how many leading blocks it has in common with the prompt."""

    depth: int
    tip: Tip[T]


class PrefixIndex(Generic[T]):
    """The tree. Every block belongs to exactly one run, and every prefix of a known chain is known."""

    def __init__(self, num_starts: int, stride: int = 8) -> None:
        """Remember up to `num_starts` trace starts a run, for `stem_depth`.

        The dict holds the first block of each run and every `stride`-th of all blocks: a miss of the cache a
        block is what an insertion costs, and the blocks between are compared in the run's own list.
        """
        self._runs: dict[BlockHash, Run[T]] = {}
        self._num_starts = num_starts
        self._stride = stride
        self._num_blocks = 0

    def __len__(self) -> int:
        """Blocks known."""
        return self._num_blocks

    def match(self, blocks: Sequence[BlockHash]) -> Match[T]:
        """The longest known prefix of `blocks`. O(log n)."""
        runs, stride = self._runs, self._stride
        low, high = 0, len(blocks) // stride  # of the blocks in the dict, low are known, those above high are not
        while low < high:
            mid = (low + high + 1) // 2
            if blocks[mid * stride - 1] in runs:
                low = mid
            else:
                high = mid - 1
        depth = low * stride
        run = runs[blocks[depth - 1]] if depth else None
        if run is not None and not run.start < depth <= run.end:
            raise BrokenChain("a block hash came at two different depths")
        while depth < len(blocks):  # fewer than `stride` steps
            block = blocks[depth]
            if run is None or depth == run.end or run.blocks[depth - run.start] != block:
                branch = runs.get(block)
                if branch is None or branch.start != depth:
                    break
                run = branch
            depth += 1
        return Match(depth, run)

    def move(self, tip: Tip[T], blocks: Sequence[BlockHash]) -> int:
        """End `tip` at the end of `blocks` (none: let go of it), index what is new, forget what nothing needs.

        Returns how many leading blocks were known. O(new + forgotten) after an O(log n) search.
        """
        found = self.match(blocks)
        if found.depth == len(blocks):
            self._place(tip, found.run, found.depth)
            return found.depth
        # First let go of the tail that this move supersedes: then the run can grow in place, and a
        # trace whose every turn rewrites its last output stays one run instead of a chain of stubs.
        self._place(tip, found.run, found.depth)
        fresh = list(blocks[found.depth :])
        run = found.run
        if run is not None and run.end == found.depth:
            run.blocks += fresh
        else:
            run = Run(run, found.depth, fresh)
            if run.parent is not None:
                run.parent.children[run] = None
        keys = self._keys(run, found.depth)
        num_keys = len(self._runs)
        self._runs.update(dict.fromkeys(keys, run))
        self._num_blocks += len(fresh)
        if len(self._runs) != num_keys + len(keys):
            raise BrokenChain("a block hash came with two different prefixes")
        self._place(tip, run, len(blocks))
        return found.depth

    def near(self, found: Match[T], limit: int) -> Iterator[Shared[T]]:
        """Chains that share most with the match, best first; of each run on the way up about `limit`, latest first.

        A caller that stops early pays for nothing above.
        """
        run, depth, seen = found.run, found.depth, None
        while run is not None:
            here = [Shared(min(tip.depth, depth), tip) for tip in islice(reversed(run.tips), limit)]
            for child in reversed(run.children):
                if len(here) > limit:
                    break
                if child is not seen:
                    shared = min(child.start, depth)
                    here += [Shared(shared, tip) for tip in _below(child, limit)]
            here.sort(key=lambda s: -s.depth)
            yield from here
            depth, seen, run = run.start, run, run.parent

    def note_start(self, found: Match[T]) -> None:
        """A new trace started by sharing `found`: every block it shared is one trace more of a stem."""
        run, depth = found.run, found.depth
        while run is not None:
            run.starts.append(depth)
            run.starts.sort(reverse=True)
            del run.starts[self._num_starts :]
            depth, run = run.start, run.parent

    def stem_depth(self, found: Match[T]) -> int:
        """How much of the match is stem: blocks with which `num_starts` further traces started."""
        run, depth = found.run, found.depth
        while run is not None:
            if len(run.starts) >= self._num_starts:
                return min(run.starts[-1], depth)
            depth, run = run.start, run.parent
        return 0

    def check_invariants(self) -> None:
        """Raise AssertionError if the tree, the dict and the chains disagree. O(n), for tests."""
        runs = set(self._runs.values())
        assert sum(len(run.blocks) for run in runs) == self._num_blocks
        assert sum(len(self._keys(run, run.start)) for run in runs) == len(self._runs)
        for run in runs:
            assert run.blocks
            assert run.tips or run.children, "an unused run"
            assert all(self._runs[b] is run for b in self._keys(run, run.start))
            assert (run.parent is None) == (run.start == 0)
            if run.parent is not None:
                assert run in run.parent.children
                assert run.parent in runs
                assert run.parent.start < run.start <= run.parent.end
            assert runs.issuperset(run.children)
            assert run.end == _needed(run), "a tail nothing needs"
            for tip in run.tips:
                assert tip.run is run
                assert run.start < tip.depth <= run.end

    def _place(self, tip: Tip[T], run: Run[T] | None, depth: int) -> None:
        before, end = tip.run, tip.depth
        if before is not None:
            before.tips.pop(tip, None)
        if run is not None:
            run.tips[tip] = None
        tip.run, tip.depth = run, depth
        if before is not None and end == before.end:
            self._trim(before)

    def _keys(self, run: Run[T], depth: int) -> list[BlockHash]:
        """The blocks of the run from `depth` on that the dict holds."""
        first = depth + self._stride - 1 - depth % self._stride
        keys = run.blocks[first - run.start :: self._stride]
        if depth == run.start and first != run.start:
            keys.append(run.blocks[0])
        return keys

    def _trim(self, run: Run[T]) -> None:
        """Forget the tail of `run` that no chain needs, and empty runs up to the root."""
        above: Run[T] | None = run
        while above is not None:
            run = above
            keep = _needed(run) - run.start
            for block in self._keys(run, run.start + keep):
                del self._runs[block]
            self._num_blocks -= len(run.blocks) - keep
            del run.blocks[keep:]
            if run.blocks:
                return
            above = run.parent
            if above is not None:
                above.children.pop(run, None)


def _needed(run: Run[T]) -> int:
    """Depth down to which chains or children need the run."""
    ends = [tip.depth for tip in run.tips]
    ends += [child.start for child in run.children]
    return max(ends, default=run.start)


def _below(run: Run[T], limit: int) -> Iterator[Tip[T]]:
    """Up to `limit` chains that end in `run` or under it."""
    stack = [run]
    while stack and limit > 0:
        top = stack.pop()
        for tip in reversed(top.tips):
            yield tip
            limit -= 1
            if limit == 0:
                return
        stack += top.children

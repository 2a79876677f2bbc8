"""vLLM's queue of free blocks, in the order of what their KV is worth instead of when it was used.

Same verbs as `FreeKVCacheBlockQueue` and the same O(1) list surgery, over several lists: blocks nobody
claims (stock's least-recently-used order, always first), one list for each trace, tail of the chain first,
and one for shared stems, always last. A stem that was idle before every chain that is left is nobody's:
whoever goes on from it had used it since. Which trace gives next is asked of `victims` once a round, only when
unclaimed blocks have run out; without claims the queue is stock's. One writer: the engine loop's thread.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from impala_vllm.core.types import TraceId

Claim = TraceId | None
"""Whose chain a freed block belongs to; None: nobody's."""


class _Chain(FreeKVCacheBlockQueue):
    """Idle blocks of one trace."""

    def __init__(self, trace_id: TraceId) -> None:
        super().__init__([])
        self.trace_id = trace_id


class FreeQueue:
    """Drop-in for `block_pool.free_block_queue`. Built from the stock queue, whose blocks it takes over."""

    def __init__(self, stock: FreeKVCacheBlockQueue, victims: Callable[[Iterable[TraceId]], list[TraceId]]) -> None:
        """`victims` orders traces by what their idle KV is worth, cheapest first. O(n log n), once a round."""
        self._unclaimed = stock
        self._stems = FreeKVCacheBlockQueue([])
        self._chains: dict[TraceId, _Chain] = {}
        self._list_of: dict[int, FreeKVCacheBlockQueue] = {}
        self._stem_since: dict[int, int] = {}
        """When an idle stem block was appended, by its id; counted in appends, as below."""
        self._idle_since: OrderedDict[TraceId, int] = OrderedDict()
        """Traces by when blocks of theirs were appended last, some of them without any by now."""
        self._num_appended = 0
        self._victims = victims
        self._round: list[TraceId] = []
        self._spared = set[TraceId]()
        self.num_free_blocks = stock.num_free_blocks
        self.claim: Claim = None
        """Set around a request's free: the blocks appended meanwhile are this trace's."""
        self.stem_blocks = frozenset[int]()
        """Ids among them that other live traces share."""
        self.changed: dict[TraceId, None] = {}
        """Traces whose idle blocks became more or fewer, in that order; the reader clears it."""
        self.evicted_blocks = 0
        """Claimed blocks handed out, whose KV is lost."""

    @property
    def num_unclaimed(self) -> int:
        """Free blocks that are nobody's: taking them costs nothing."""
        return self._unclaimed.num_free_blocks

    def claims(self) -> dict[TraceId, int]:
        """Idle blocks by trace."""
        return {trace_id: chain.num_free_blocks for trace_id, chain in self._chains.items()}

    def num_claimed(self, trace_id: TraceId) -> int:
        """Idle blocks of one trace."""
        chain = self._chains.get(trace_id)
        return chain.num_free_blocks if chain is not None else 0

    def take_over(self, stock: FreeKVCacheBlockQueue) -> None:
        """Go on from a stock queue that served meanwhile; whoever has claims has released them."""
        assert not self._list_of
        self._unclaimed, self.num_free_blocks = stock, stock.num_free_blocks
        self.new_round()

    def release(self, trace_id: TraceId) -> None:
        """The trace is over, or went on from elsewhere: its idle blocks go first from now on. O(blocks)."""
        self._idle_since.pop(trace_id, None)
        chain = self._chains.pop(trace_id, None)
        if chain is None:
            return
        blocks = chain.popleft_n(chain.num_free_blocks)
        for block in blocks:
            del self._list_of[block.block_id]
        self._unclaimed.append_n(blocks)
        self.changed[trace_id] = None

    def release_all(self) -> None:
        """No claim holds any more: their KV is gone, or policy is. O(blocks)."""
        for trace_id in list(self._chains):
            self.release(trace_id)
        self._release_stems(self._num_appended + 1)

    def new_round(self) -> None:
        """Worth has changed (time passed, a turn came or went): ask `victims` again when it comes to that."""
        self._round = []
        self._spared.clear()

    def spare(self, trace_id: TraceId) -> None:
        """Pass the trace over until the order is asked for again."""
        self._spared.add(trace_id)

    def popleft(self) -> KVCacheBlock:
        if not self.num_free_blocks:
            raise ValueError("No free blocks available")
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        assert self.num_free_blocks >= n
        self.num_free_blocks -= n
        taken = self._unclaimed.popleft_n(min(n, self._unclaimed.num_free_blocks))
        if len(taken) < n:
            self._release_stems(self._oldest())
            taken += self._unclaimed.popleft_n(min(n - len(taken), self._unclaimed.num_free_blocks))
        while len(taken) < n:
            chain = self._next_chain()
            blocks = chain.popleft_n(min(n - len(taken), chain.num_free_blocks))
            for block in blocks:
                del self._list_of[block.block_id]
            self.evicted_blocks += len(blocks)
            if isinstance(chain, _Chain):
                self.changed[chain.trace_id] = None
            taken += blocks
        return taken

    def remove(self, block: KVCacheBlock) -> None:
        queue = self._list_of.pop(block.block_id, self._unclaimed)
        queue.remove(block)
        if isinstance(queue, _Chain):
            self.changed[queue.trace_id] = None
        self.num_free_blocks -= 1

    def append(self, block: KVCacheBlock) -> None:
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        """Free cached blocks, the tail of a chain first."""
        self.num_free_blocks += len(blocks)
        if self.claim is None:
            self._unclaimed.append_n(blocks)
            return
        self._num_appended += 1
        stems = [b for b in blocks if b.block_id in self.stem_blocks] if self.stem_blocks else []
        own = [b for b in blocks if b.block_id not in self.stem_blocks] if stems else blocks
        if own:
            chain = self._chains.get(self.claim)
            if chain is None:
                chain = self._chains[self.claim] = _Chain(self.claim)
            self._put(chain, own)
            self.changed[self.claim] = None
            self._idle_since[self.claim] = self._num_appended
            self._idle_since.move_to_end(self.claim)
        if stems:
            self._put(self._stems, stems)
            self._stem_since.update((b.block_id, self._num_appended) for b in stems)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        """Free blocks without a hash: reused first."""
        self.num_free_blocks += len(blocks)
        self._unclaimed.prepend_n(blocks)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        return list(self.iter_blocks_after(None))

    def iter_blocks_after(self, cursor: KVCacheBlock | None) -> Iterator[KVCacheBlock]:
        """Free blocks in eviction order after the cursor, as far as the order is decided now."""
        seen = cursor is None
        for queue in (self._unclaimed, *(self._chains[t] for t in self._order()), self._stems):
            for block in queue.get_all_free_blocks():
                if seen:
                    yield block
                seen = seen or block is cursor

    def check_invariants(self) -> None:
        """Raise AssertionError if lists and counts disagree. O(n), for tests."""
        queues = [self._unclaimed, self._stems, *self._chains.values()]
        blocks = [b for q in queues for b in q.get_all_free_blocks()]
        assert len(blocks) == len({b.block_id for b in blocks}) == self.num_free_blocks
        assert all(q.num_free_blocks == len(q.get_all_free_blocks()) for q in queues)
        for queue in queues[1:]:
            assert all(self._list_of[b.block_id] is queue for b in queue.get_all_free_blocks())
        assert len(self._list_of) == len(blocks) - self._unclaimed.num_free_blocks

    def _put(self, queue: FreeKVCacheBlockQueue, blocks: list[KVCacheBlock]) -> None:
        queue.append_n(blocks)
        self._list_of.update((b.block_id, queue) for b in blocks)

    def _oldest(self) -> int:
        """When the chain was appended that is idle longest."""
        since = self._idle_since
        while since and not self.num_claimed(next(iter(since))):
            since.popitem(last=False)
        return next(iter(since.values()), self._num_appended)

    def _release_stems(self, before: int) -> None:
        stems, ended = self._stems, list[KVCacheBlock]()
        while stems.num_free_blocks:
            first = stems.fake_free_list_head.next_free_block
            assert first is not None
            if self._stem_since[first.block_id] >= before:
                break
            ended.append(stems.popleft())
            del self._list_of[first.block_id]
        self._unclaimed.append_n(ended)

    def _order(self) -> list[TraceId]:
        return self._victims([t for t, chain in self._chains.items() if chain.num_free_blocks])

    def _next_chain(self) -> FreeKVCacheBlockQueue:
        while True:
            if not self._round:
                self._forget_empty()
                self._spared.clear()
                self._round = list(reversed(self._order()))
                if not self._round:
                    return self._stems
            chain = self._chains.get(self._round[-1])
            if chain is not None and chain.num_free_blocks and chain.trace_id not in self._spared:
                return chain
            self._round.pop()

    def _forget_empty(self) -> None:
        for trace_id in [t for t, chain in self._chains.items() if not chain.num_free_blocks]:
            del self._chains[trace_id]

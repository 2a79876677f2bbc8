"""Whose the blocks are that vLLM frees: the free queue is told around each free, however late that comes."""

from typing import TYPE_CHECKING

from impala_vllm.core.open_turns import OpenTurn
from impala_vllm.core.types import RequestId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from impala_vllm.adapters.vllm.free_queue import FreeQueue
    from impala_vllm.core.open_turns import OpenTurns


class Claims:
    """Of requests that end, are preempted, or whose blocks a connector or a step in flight still holds. O(1) but for
    the blocks of a shared stem. `free` None: there is no queue that asks."""

    def __init__(self, scheduler: "Scheduler", turns: "OpenTurns[OpenTurn]", free: "FreeQueue | None") -> None:
        self._scheduler = scheduler
        self._turns = turns
        self._free = free
        self._unfreed: dict[str, OpenTurn] = {}
        """Ended, but their connector still wants their blocks; by request id."""
        self._deferred: dict[int, tuple[OpenTurn, frozenset[int]]] = {}
        """Turns and their shared blocks, by the identity of an entry of vLLM's deferred frees."""
        self._claimer: OpenTurn | None = None
        self._num_deferred = 0

    def keep(self, request: "Request", turn: OpenTurn, stem_blocks: int) -> None:
        """The turn has ended; its blocks, the first `stem_blocks` of them shared, are freed when its connector is
        done."""
        turn.stem_blocks = stem_blocks
        self._unfreed[request.request_id] = turn

    def claim(self, request: "Request", stem_blocks: int) -> None:
        """The blocks freed until `unclaim` are the request's; its first `stem_blocks` are shared with others."""
        turn = self._turns.get(RequestId(request.request_id))
        if turn is not None:
            turn.stem_blocks = stem_blocks
        else:
            turn = self._unfreed.pop(request.request_id, None)
        if self._free is None or turn is None:
            return
        self._claimer, self._num_deferred = turn, len(self._scheduler.deferred_frees)
        self._free.claim = self._turns.trace_of(turn)
        if turn.stem_blocks and self._free.claim is not None:
            blocks = self._scheduler.kv_cache_manager.get_block_ids(request.request_id)[0]
            self._free.stem_blocks = frozenset(blocks[: turn.stem_blocks])

    def unclaim(self) -> None:
        """What vLLM has put off freeing keeps its claim, for `reclaim`."""
        if self._free is None:
            return
        deferred = self._scheduler.deferred_frees
        if self._claimer is not None and len(deferred) > self._num_deferred:
            self._deferred[id(deferred[-1][1])] = self._claimer, self._free.stem_blocks
        self._claimer = None
        self._free.claim, self._free.stem_blocks = None, frozenset()

    def reclaim(self, blocks: "Sequence[KVCacheBlock]") -> None:
        """`claim` for an entry of vLLM's deferred frees, which is freed now."""
        turn, stem_blocks = self._deferred.pop(id(blocks), (None, frozenset[int]()))
        if self._free is not None and turn is not None:
            self._free.claim, self._free.stem_blocks = self._turns.trace_of(turn), stem_blocks

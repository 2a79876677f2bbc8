"""The host tier: slots, whose chunks lie in them, and what is given up for what comes.

Decides nothing of its own: `core.chains` names the victims. Runs on the engine loop's thread; workers and the NVMe
store move the bytes.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

from vllm.v1.kv_offload.base import Medium, OffloadingEvent, OffloadKey

from impala_vllm.adapters.vllm.tiers.turns import Turns
from impala_vllm.core.allocator import Key, SlotPool
from impala_vllm.core.chains import Chains
from impala_vllm.core.types import TraceId


class HostTier:
    """`worth` says what a trace's KV in it is worth, `on_evict` is told what it gives up."""

    def __init__(
        self,
        num_slots: int,
        turns: Turns,
        worth: Callable[[TraceId], float],
        on_evict: Callable[[Sequence[Key]], None],
        enable_events: bool = False,
    ) -> None:
        self.pool = SlotPool(num_slots)
        self.chains = Chains(num_slots, worth)
        self.num_evicted = 0
        """Chunks."""
        self._turns, self._on_evict = turns, on_evict
        self._events: list[OffloadingEvent] | None = [] if enable_events else None

    def make_room(
        self,
        num_chunks: int,
        place: Callable[[Key], int | None],
        spared: Collection[TraceId] = (),
        only_cheaper_than: TraceId | None = None,
        only_nobodys: bool = False,
    ) -> list[Key]:
        """Give up what is worth least until so many slots are free, or nothing is left that may go. Returns it.

        `place` says where in the turn that asks a chunk stands; None: it is none of it. Its own chunks stay, and those
        of the traces `spared`. The last two as for `Chains.victims`.
        """
        lacking = num_chunks - self.pool.num_free
        if lacking <= 0:
            return []
        victims = self.chains.victims(
            lacking,
            lambda some: [key for key in self.pool.evictable(some) if place(key) is None],
            spared,
            only_cheaper_than,
            self._turns.undecided,
            only_nobodys,
        )
        self.evict(victims)
        return victims

    def fill(self, keys: Sequence[Key], trace_id: TraceId | None) -> None:
        """The bytes of these chunks, root first, are there; they are the trace's."""
        self.pool.commit(keys)
        self.chains.add(keys, trace_id)
        self._note(keys, removed=False)

    def evict(self, keys: Sequence[Key]) -> None:
        """Give up ready chunks that nobody reads."""
        self.pool.evict(keys)
        if keys:
            self._turns.went(self.chains.drop(keys))
        self.num_evicted += len(keys)
        self._on_evict(keys)
        self._note(keys, removed=True)

    def clear(self, moving: Collection[Key]) -> None:
        """Forget everything; slots of `moving` are free once their bytes have stopped."""
        self.pool.clear(moving)
        self.chains.clear()

    def take_events(self) -> Iterable[OffloadingEvent]:
        """What came and went since the last call, for vLLM's KV events."""
        events, self._events = self._events, [] if self._events is not None else None
        return events or ()

    def _note(self, keys: Sequence[Key], removed: bool) -> None:
        if keys and self._events is not None:
            self._events.append(OffloadingEvent([OffloadKey(k) for k in keys], Medium.CPU, removed))

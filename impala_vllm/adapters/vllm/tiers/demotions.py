"""Copies from host to NVMe: made while the store's queue has room, the others remembered until it has.

What is being copied keeps its place in both tiers until the disk has it. What waits for room in the queue holds none.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from impala_vllm.adapters.vllm.tiers.moves import Move, Moves
from impala_vllm.core.allocator import Key, SlotPool
from impala_vllm.core.types import TraceId
from impala_vllm.transfer.jobs import Item
from impala_vllm.transfer.nvme_store import NvmeStore

WRITE_BYTES = 64 << 20
"""Most of one write: the store takes all of it or nothing, and room is made before it is asked."""

MAX_WAITING = 64
"""Demotions remembered that the store had no room for; host may have lost the oldest by then."""


class Demotion(NamedTuple):
    """Chunks to be copied, root first."""

    keys: Sequence[Key]
    trace_id: TraceId | None
    parent: Callable[[Key], Key | None]
    """What lies before a chunk: after a restart it shall not go before it."""


class Demotions:
    """Of the tier whose pool is `nvme`. `make_room` frees slots there that hold what is cheaper than a trace."""

    def __init__(
        self,
        store: NvmeStore,
        moves: Moves,
        host: SlotPool,
        nvme: SlotPool,
        make_room: Callable[[int, TraceId | None], None],
        chunk_bytes: int,
    ) -> None:
        self.num_unplaced = 0
        """Chunks for which there was no room."""
        self._store, self._moves, self._host, self._nvme = store, moves, host, nvme
        self._make_room, self._chunk_bytes = make_room, chunk_bytes
        self._waiting: deque[Demotion] = deque(maxlen=MAX_WAITING)

    def start(self, what: Demotion, rows: Callable[[int], memoryview], now: float) -> None:
        """Copy what host has of it and NVMe has not; later, where the disk is busy. What finds no place is left out.

        `rows` gives the bytes of a host slot.
        """
        left = self._copy(what, rows, now)
        if left:
            self._waiting.append(what._replace(keys=left))

    def go_on(self, rows: Callable[[int], memoryview], now: float) -> None:
        """The store has done something: copy what waits, oldest first."""
        while self._waiting:
            left = self._copy(self._waiting[0], rows, now)
            if left:
                self._waiting[0] = self._waiting[0]._replace(keys=left)
                return
            self._waiting.popleft()

    def forget(self) -> None:
        """What waits is nobody's any more."""
        self._waiting.clear()

    def _copy(self, what: Demotion, rows: Callable[[int], memoryview], now: float) -> Sequence[Key]:
        """Returns what the store's queue has no room for now."""
        fresh: Sequence[Key] = self._nvme.missing(filter(self._host.ready.__contains__, what.keys))
        if not fresh or self._store.is_open:
            return ()
        most_bytes = self._store.limits.max_queued_write_bytes
        step = max(1, WRITE_BYTES // self._chunk_bytes)
        while fresh:
            room = max(0, most_bytes - self._store.queued_write_bytes) // self._chunk_bytes
            part = fresh[: min(step, room)]
            if not part:
                return fresh
            if not self._write(part, what, rows, now):
                if not self._nvme.num_free:  # else it was the disk that took nothing
                    self.num_unplaced += len(fresh) - len(part)
                break
            fresh = fresh[len(part) :]
        return ()

    def _write(self, fresh: Sequence[Key], what: Demotion, rows: Callable[[int], memoryview], now: float) -> bool:
        """False: no use to go on."""
        if len(fresh) > self._nvme.num_free:
            self._make_room(len(fresh) - self._nvme.num_free, what.trace_id)
        num_wanted, fresh = len(fresh), fresh[: self._nvme.num_free]
        self.num_unplaced += num_wanted - len(fresh)
        slots = self._nvme.reserve(fresh)
        if not fresh or slots is None:
            return False
        pin = self._host.pin(fresh)
        items = list(map(Item, fresh, slots, map(rows, pin.slots), map(what.parent, fresh)))
        number = self._moves.start(Move(True, fresh, what.trace_id, pin, pin.slots, slots, now))
        if self._store.submit_write(number, items):
            return True
        self._moves.end(number)
        pin.release()
        self._nvme.abort(fresh)  # the room stays free for the next one
        return False

"""The jobs under way between host and NVMe: what they hold, and since when nobody waits for them any more."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from impala_vllm.core.allocator import Key, Pin
from impala_vllm.core.types import TraceId


@dataclass(slots=True)
class Move:
    """One job of the store."""

    is_write: bool
    keys: Sequence[Key]
    trace_id: TraceId | None
    source: Pin
    """Keeps what is read where it is."""
    host_slots: Sequence[int]
    nvme_slots: Sequence[int]
    late_s: float
    is_withdrawn: bool = False
    """A read called back: what has not begun will not."""
    is_void: bool = False
    """The tiers were emptied meanwhile: its slots are doomed, its bytes are nobody's."""


class Moves:
    """By the store's job id. One writer."""

    def __init__(self) -> None:
        self._moves: dict[int, Move] = {}
        self._reads: dict[int, Move] = {}
        self._reading: dict[Key, int] = {}
        self._num_started = 0

    def __len__(self) -> int:
        return len(self._moves)

    def start(self, move: Move) -> int:
        """A job id for it."""
        self._num_started += 1
        self._moves[self._num_started] = move
        if not move.is_write:
            self._reads[self._num_started] = move
            self._reading.update(dict.fromkeys(move.keys, self._num_started))
        return self._num_started

    def end(self, job_id: int) -> Move:
        """The store is done with it, or never took it."""
        move = self._moves.pop(job_id)
        self._reads.pop(job_id, None)
        if not move.is_write and not move.is_void:
            for key in move.keys:
                del self._reading[key]
        return move

    @property
    def num_reads(self) -> int:
        """Under way, those called back included."""
        return len(self._reads)

    def is_reading(self, key: Key) -> bool:
        """The chunk is on its way into host."""
        return key in self._reading

    def is_late(self, key: Key, now: float) -> bool:
        """Its read is overdue."""
        move = self._moves.get(self._reading.get(key, -1))
        return move is not None and now > move.late_s

    def is_busy(self, now: float) -> bool:
        """Some read is under way and not overdue. O(reads)."""
        return any(now <= move.late_s for move in self._reads.values())

    def overdue(self, now: float) -> list[tuple[int, Key]]:
        """Reads that took too long and were not called back, each with its first chunk. O(reads)."""
        late = [(job_id, move) for job_id, move in self._reads.items() if now > move.late_s]
        return [(job_id, move.keys[0]) for job_id, move in late if not move.is_withdrawn]

    def reads_for(self, keys: Collection[Key]) -> list[tuple[int, Key]]:
        """Reads of these chunks that were not called back, each with its first chunk. O(reads)."""
        return [
            (job_id, move.keys[0])
            for job_id, move in self._reads.items()
            if move.keys[0] in keys and not move.is_withdrawn and not move.is_void
        ]

    def withdraw(self, job_id: int) -> None:
        """The read was called back; it still ends."""
        self._moves[job_id].is_withdrawn = True

    def forget_traces(self) -> None:
        """There are no traces any more."""
        for move in self._moves.values():
            move.trace_id = None

    def void(self) -> set[Key]:
        """The tiers are emptied. Returns the chunks whose slots the store still reads or fills."""
        moving: set[Key] = set()
        for move in self._moves.values():
            if not move.is_void:
                moving.update(move.keys)
                move.is_void = True
        self._reading.clear()
        return moving

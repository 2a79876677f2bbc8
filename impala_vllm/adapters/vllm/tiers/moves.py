"""The jobs under way between host and NVMe: what they hold, and since when nobody waits for them any more."""

from collections.abc import Sequence
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
    is_void: bool = False
    """The tiers were emptied meanwhile: its slots are doomed, its bytes are nobody's."""


class Moves:
    """By the store's job id. One writer."""

    def __init__(self) -> None:
        self._moves: dict[int, Move] = {}
        self._reading: dict[Key, int] = {}
        self._num_started = 0

    def __len__(self) -> int:
        return len(self._moves)

    def start(self, move: Move) -> int:
        """A job id for it."""
        self._num_started += 1
        self._moves[self._num_started] = move
        if not move.is_write:
            self._reading.update(dict.fromkeys(move.keys, self._num_started))
        return self._num_started

    def end(self, job_id: int) -> Move:
        """The store is done with it, or never took it."""
        move = self._moves.pop(job_id)
        if not move.is_write and not move.is_void:
            for key in move.keys:
                del self._reading[key]
        return move

    def is_reading(self, key: Key) -> bool:
        """The chunk is on its way into host."""
        return key in self._reading

    def is_late(self, key: Key, now: float) -> bool:
        """Its read is overdue."""
        move = self._moves.get(self._reading.get(key, -1))
        return move is not None and now > move.late_s

    def is_busy(self, now: float) -> bool:
        """Some read is under way and not overdue. O(jobs)."""
        return any(not move.is_write and now <= move.late_s for move in self._moves.values())

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

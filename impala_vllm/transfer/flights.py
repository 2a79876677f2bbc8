"""The ops at the disk: whether one more may start, and what is under way. Decides no order."""

from dataclasses import dataclass

from impala_vllm.transfer.block_io import BlockIo, Completion, Op
from impala_vllm.transfer.jobs import Item, Job
from impala_vllm.transfer.limits import Limits
from impala_vllm.transfer.rate import Meter, TokenBucket
from impala_vllm.transfer.slab_records import Record


@dataclass(frozen=True, slots=True)
class Flight:
    """An item at the disk."""

    job: Job
    item: Item
    record: Record | None
    """What a read must find; None for a write."""
    started_s: float


class Flights:
    """Items at the disk. Every `board` is followed by `launch`, and answered by one `land`."""

    def __init__(self, io: BlockIo, limits: Limits, now: float) -> None:
        self.read_meter, self.write_meter = Meter(), Meter()
        self._io, self._limits = io, limits
        self._read_bucket = TokenBucket(limits.read_bytes_per_s, now)
        self._write_bucket = TokenBucket(limits.write_bytes_per_s, now)
        self._flights: dict[int, Flight] = {}
        """By token, oldest first."""
        self._boarded: list[Op] = []
        self._num_writes = 0
        self._num_at: dict[int, int] = {}
        """By slot: its readers, or -1 for a writer, which is alone."""
        self._next_token = 1

    def has_room(self, job: Job) -> bool:
        """Whether bounds and slots let the job's next item start, rates aside. If not, a `land` changes that."""
        num_at_slot = self._num_at.get(job.items[job.num_started].slot, 0)
        if len(self._flights) >= self._limits.max_in_flight:
            return False
        if job.is_write:
            return num_at_slot == 0 and self._num_writes < self._limits.max_writes_in_flight
        return num_at_slot >= 0

    def ready_in_s(self, is_write: bool, now: float) -> float:
        """Seconds until the rate lets a read or write start."""
        return (self._write_bucket if is_write else self._read_bucket).ready_in_s(now)

    def board(self, job: Job, item: Item, record: Record | None, offset_bytes: int, now: float) -> None:
        """Take an item that has room; `launch` sends it off."""
        token, self._next_token = self._next_token, self._next_token + 1
        self._flights[token] = Flight(job, item, record, now)
        self._boarded.append(Op(token, job.is_write, offset_bytes, item.buffer))
        (self._write_bucket if job.is_write else self._read_bucket).take(item.buffer.nbytes, now)
        (self.write_meter if job.is_write else self.read_meter).start(now)
        self._num_writes += job.is_write
        self._num_at[item.slot] = -1 if job.is_write else self._num_at.get(item.slot, 0) + 1

    def launch(self) -> list[Completion]:
        """Send off what boarded. Returns completions of the ops that the engine refused."""
        ops, self._boarded = self._boarded, []
        if not ops:
            return []
        try:
            self._io.submit(ops)
            return []
        except ValueError:
            return [refusal for op in ops if (refusal := self._submit(op)) is not None]

    def land(self, completion: Completion, now: float) -> Flight:
        """The op is done: make room. Returns what it was."""
        flight = self._flights.pop(completion.token)
        num_bytes = flight.item.buffer.nbytes if completion.error is None else 0
        is_write, slot = flight.job.is_write, flight.item.slot
        (self.write_meter if is_write else self.read_meter).finish(num_bytes, now)
        self._num_writes -= is_write
        self._num_at[slot] += 1 if is_write else -1
        if not self._num_at[slot]:
            del self._num_at[slot]
        return flight

    def oldest_read_s(self) -> float | None:
        """When the oldest read at the disk started; None: there is none. O(writes in flight)."""
        return next((flight.started_s for flight in self._flights.values() if not flight.job.is_write), None)

    def _submit(self, op: Op) -> Completion | None:
        try:
            self._io.submit([op])
        except ValueError as error:
            return Completion(op.token, OSError(22, str(error)), None, 0.0)
        return None

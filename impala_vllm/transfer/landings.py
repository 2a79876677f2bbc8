"""What an op at the disk comes to when it ends: recorded or verified, counted, and trouble where it is trouble.

Owned by the coordinator and of its thread. Starts nothing and knows no order.
"""

import logging
import math
from collections.abc import Callable, Sequence

from impala_vllm.transfer.block_io import Completion
from impala_vllm.transfer.breaker import Breaker
from impala_vllm.transfer.counters import Counters
from impala_vllm.transfer.flights import Flight
from impala_vllm.transfer.jobs import Job
from impala_vllm.transfer.slab import Slab

logger = logging.getLogger("vllm.impala")

_SAVE_WEAR_EVERY_S = 1.0


class Landings:
    """The slab's records, the totals, and the breaker's reasons to open."""

    def __init__(self, slab: Slab, breaker: Breaker, on_trip: Callable[[], None], today: Callable[[], int]) -> None:
        """`on_trip`: the breaker has opened."""
        self.counters = Counters()
        self._slab, self._breaker, self._on_trip, self._today = slab, breaker, on_trip, today
        self._void_below: dict[int | None, int] = {}
        """Serials below which a slot's jobs, or all jobs (None), are void."""
        self._save_wear_s: float | None = None

    def land(self, flight: Flight, completion: Completion, now: float) -> bool:
        """Whether the item is where it should be: written and recorded, or read and verified."""
        try:
            return (self._written if flight.job.is_write else self._read)(flight, completion, now)
        except OSError as error:
            self.note_error(error, flight.job.is_write, now)
            return False

    def forget(self, slots: Sequence[int] | None, serial: int, now: float) -> None:
        """What the slots hold, or get from jobs of a smaller serial, is void; None: all."""
        errors: list[OSError] = []
        for slot in slots if slots is not None else (None,):
            self._void_below[slot] = serial
            try:
                if slot is None:
                    self._slab.clear()
                else:
                    self._slab.invalidate(slot)
            except OSError as error:
                errors.append(error)
                self.note_error(error, True, now)
        if errors and slots is None:
            # What is written from now on may be of other weights, and a restart would find it among the old ones.
            logger.error("%s: cannot be emptied, so it is not used any more: %s", self._slab.path, errors[0])
            self._breaker.kill()
            self._on_trip()
        elif errors:
            logger.error("%s: cannot forget %d slots on disk: %s", self._slab.path, len(errors), errors[0])

    def is_void(self, job: Job, slot: int) -> bool:
        """The slot was forgotten after the job was submitted."""
        return job.serial < max(self._void_below.get(slot, 0), self._void_below.get(None, 0))

    def no_jobs_left(self) -> None:
        """Nobody asks `is_void` of an older job any more."""
        self._void_below.clear()

    def note_error(self, error: OSError, is_write: bool, now: float) -> None:
        """The system refused something."""
        if is_write:
            self.counters.num_write_errors += 1
        else:
            self.counters.num_read_errors += 1
        self._trouble(now, str(error))

    def note_stuck(self, seconds: float, now: float) -> None:
        """A read has had no answer for so long."""
        if self._breaker.trip(now):
            self._tripped(f"no answer to a read for {seconds:.1f} s")

    def save_wear(self, now: float) -> None:
        """Write down what was written, if that is due."""
        if self._save_wear_s is not None and now >= self._save_wear_s:
            self._save_wear_s = None
            try:
                self._slab.save_wear()
            except OSError as error:
                self.note_error(error, True, now)

    @property
    def due_s(self) -> float:
        """When `save_wear` has something to do; `math.inf`: there is nothing."""
        return self._save_wear_s if self._save_wear_s is not None else math.inf

    def _written(self, flight: Flight, completion: Completion, now: float) -> bool:
        item = flight.item
        self._slab.add_written(item.buffer.nbytes, self._today())
        if self._save_wear_s is None:
            self._save_wear_s = now + _SAVE_WEAR_EVERY_S
        if completion.error is not None:
            raise completion.error
        assert completion.checksum is not None
        if self.is_void(flight.job, item.slot):
            return False
        self._slab.commit(item.slot, item.key, item.buffer.nbytes, completion.checksum, item.parent)
        self._breaker.succeed()
        self.counters.num_writes += 1
        self.counters.write_bytes += item.buffer.nbytes
        return True

    def _read(self, flight: Flight, completion: Completion, now: float) -> bool:
        item, record = flight.item, flight.record
        assert record is not None
        if completion.error is None and completion.checksum == record.checksum:
            self._breaker.succeed()
            if self.is_void(flight.job, item.slot):
                return False
            self.counters.num_reads += 1
            self.counters.read_bytes += item.buffer.nbytes
            return True
        if self._slab.record(item.slot) == record:
            self._slab.invalidate(item.slot)
        if completion.error is not None:
            raise completion.error
        self.counters.num_checksum_failures += 1
        if self.counters.num_checksum_failures == 1:
            logger.warning("%s: slot %d held other bytes than were written; dropped", self._slab.path, item.slot)
        self._trouble(now, "wrong checksums")
        return False

    def _trouble(self, now: float, why: str) -> None:
        if self._breaker.fail(now):
            self._tripped(why)

    def _tripped(self, why: str) -> None:
        logger.error("%s: the disk is left alone for a while: %s", self._slab.path, why)
        self._on_trip()

"""Runs jobs on a slab: starts their items in order, under caps and a breaker, and verifies what is read.

Single-threaded: `step` does what is due, and waits for the disk no longer than until something else is. The thread
around it, and the side that the engine sees, are in nvme_store.py.
"""

import logging
import math
from collections import deque
from collections.abc import Callable

from impala_vllm.transfer.block_io import BlockIo, Completion
from impala_vllm.transfer.breaker import Breaker
from impala_vllm.transfer.flights import Flights
from impala_vllm.transfer.jobs import Item, Job, JobQueue, Result
from impala_vllm.transfer.landings import Landings
from impala_vllm.transfer.limits import Limits
from impala_vllm.transfer.messages import Forget, Message, Withdraw
from impala_vllm.transfer.probe import PROBE_TOKEN, Probe
from impala_vllm.transfer.slab import Slab

logger = logging.getLogger("vllm.impala")


class Coordinator:
    """Owns slab and engine. Other threads may use `inbox` and `results`, and read the public numbers."""

    def __init__(
        self, slab: Slab, io: BlockIo, limits: Limits, clock: Callable[[], float], today: Callable[[], int]
    ) -> None:
        self.inbox: deque[Message] = deque()
        self.results: deque[Result] = deque()
        self.breaker = Breaker(limits.max_consecutive_errors, limits.cooldown_s, limits.max_cooldown_s)
        self._landings = Landings(slab, self.breaker, self._withdraw_all, today)
        self.counters = self._landings.counters
        self.flights = Flights(io, limits, clock())
        self.busy_since_s: float | None = None
        """Since when `step` has done something else than wait for ops: on a bad disk index I/O hangs as well."""
        self.oldest_read_s: float | None = None
        """When the oldest read at the disk started."""
        self._slab, self._io, self._limits, self._clock = slab, io, limits, clock
        self._probe = Probe(io, slab.probe_offset_bytes)
        self._queue = JobQueue()
        self._jobs: dict[int, Job] = {}

    def step(self, max_wait_s: float = 60.0) -> None:
        """Take messages, start what may start, wait until an op ends or something is due, and finish what ended."""
        now = self.busy_since_s = self._clock()
        self._take_all(now)
        self._check_stuck(now)
        self._start(now)
        self._landings.save_wear(now)
        self.oldest_read_s = self.flights.oldest_read_s()
        wait_s = min(max_wait_s, self._idle_s(now))
        self.busy_since_s = None
        completions = self._io.poll(wait_s)
        now = self.busy_since_s = self._clock()
        for completion in completions:
            self._finish(completion, now)
        self.oldest_read_s = self.flights.oldest_read_s()
        self.busy_since_s = None

    def stop(self) -> None:
        """Withdraw what has not started, wait for the rest, close engine and slab."""
        self.breaker.kill()
        self._take_all(self._clock())
        self._withdraw_all()
        while self._io.num_in_flight:
            self.step()
        self._close()

    def die(self) -> None:
        """After an exception: wait for the disk, then give every job back as failed or untried.

        Raises what closing the engine raises. What was at the disk is then not given back: the disk may still use it.
        """
        self.breaker.kill()
        self._withdraw_all()
        self._io.close()
        for job in list(self._jobs.values()):
            job.give_up()
            self._settle(job)
        self._close()

    def refuse_inbox(self) -> None:
        """Give the inbox's jobs back as untried. For any thread, once nobody steps any more."""
        while True:
            try:
                message = self.inbox.popleft()
            except IndexError:
                return
            if isinstance(message, Job):
                message.is_withdrawn = True
                self.results.append(message.result(self._clock()))

    def _take_all(self, now: float) -> None:
        while self.inbox:
            self._take(self.inbox.popleft(), now)

    def _take(self, message: Message, now: float) -> None:
        match message:
            case Job():
                message.is_withdrawn |= self.breaker.is_open
                self._jobs[message.job_id] = message
                self._queue.add(message)
                self._settle(message)
            case Withdraw(job_id):
                if job_id in self._jobs:
                    self._settle(self._jobs[job_id])
            case Forget():
                self._landings.forget(message.slots, message.serial, now)

    def _start(self, now: float) -> None:
        """Start what order, room, rates and the breaker allow."""
        if self.breaker.is_open:
            if not self._io.num_in_flight and self.breaker.probe_in_s(now) <= 0.0:
                self.breaker.start_probe()
                self._probe.start()
            return
        while not self.breaker.is_open and (job := self._next_job(now)) is not None:
            self._begin(job, now)
        for refusal in self.flights.launch():
            self._finish(refusal, now)
        if not self._jobs:
            self._landings.no_jobs_left()

    def _next_job(self, now: float) -> Job | None:
        """The job whose next item is to start now. Writes wait for no read that cannot start itself."""
        for job in (self._queue.next_read(), self._queue.next_write()):
            if job is not None and self.flights.has_room(job) and self.flights.ready_in_s(job.is_write, now) <= 0.0:
                return job
        return None

    def _begin(self, job: Job, now: float) -> None:
        item = job.items[job.num_started]
        job.begin(now)
        record = self._slab.record(item.slot)
        if self._landings.is_void(job, item.slot):
            self._end(job, item, False)
            return
        if job.is_write:
            try:
                self._slab.invalidate(item.slot)
            except OSError as error:
                self._landings.note_error(error, True, now)
                self._end(job, item, False)
                return
            record = None
        elif record is None or record.key != item.key or record.length != item.buffer.nbytes:
            self.counters.num_key_mismatches += 1
            self._end(job, item, False)
            return
        self.flights.board(job, item, record, self._slab.offset_bytes(item.slot), now)

    def _finish(self, completion: Completion, now: float) -> None:
        if completion.token == PROBE_TOKEN:
            is_well = self._probe.land(completion)
            if is_well is not None:
                self.breaker.end_probe(is_well, now)
                if is_well and not self.breaker.is_dead:
                    logger.info("%s: the disk works again", self._slab.path)
            return
        flight = self.flights.land(completion, now)
        self._end(flight.job, flight.item, self._landings.land(flight, completion, now))

    def _end(self, job: Job, item: Item, is_done: bool) -> None:
        job.end(item, is_done)
        self._settle(job)

    def _settle(self, job: Job) -> None:
        """Give the job back if nothing of it is left to do."""
        if not job.has_waiting and not job.num_in_flight:
            del self._jobs[job.job_id]
            self.results.append(job.result(self._clock()))
            job.items = ()  # it may stay in the queue for a while, its buffers must not

    def _withdraw(self, job: Job) -> None:
        job.is_withdrawn = True
        self._settle(job)

    def _withdraw_all(self) -> None:
        for job in list(self._jobs.values()):
            self._withdraw(job)

    def _check_stuck(self, now: float) -> None:
        oldest_s = self.flights.oldest_read_s()
        if oldest_s is not None and now - oldest_s >= self._limits.stuck_s:
            self._landings.note_stuck(now - oldest_s, now)

    def _idle_s(self, now: float) -> float:
        """Seconds until something is due that no completion and no message announces."""
        due_s = self._landings.due_s
        if self.breaker.is_open:
            in_s = math.inf if self._io.num_in_flight else self.breaker.probe_in_s(now)
            return max(0.0, min(in_s, due_s - now))
        oldest_s = self.flights.oldest_read_s()
        if oldest_s is not None:
            due_s = min(due_s, oldest_s + self._limits.stuck_s)
        for job in (self._queue.next_read(), self._queue.next_write()):
            if job is not None and self.flights.has_room(job):
                due_s = min(due_s, now + self.flights.ready_in_s(job.is_write, now))
        return max(0.0, due_s - now)

    def _close(self) -> None:
        self._io.close()
        self._slab.close()
        self.refuse_inbox()

"""The manager as vLLM's connector drives it: whatever comes in whatever order, no slot ever has two owners.

Bytes are real and are looked at after every step; time is the test's own.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadKey,
    ReqContext,
    ScheduleEndContext,
    get_offload_block_hash,
    make_offload_key,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from impala_vllm.adapters.vllm.tiers.manager import TierManager
from impala_vllm.adapters.vllm.tiers.nvme import LATE_S, NvmeTier
from impala_vllm.adapters.vllm.tiers.turns import Turn
from impala_vllm.core.admission import Admission
from impala_vllm.core.allocator import SlotPool
from impala_vllm.core.chains import Chains
from impala_vllm.core.cost import StepCost
from impala_vllm.core.gaps import GapForecast
from impala_vllm.core.idle import IdleKv
from impala_vllm.core.planner import Below, Planner, PlannerConfig
from impala_vllm.core.retention import Retention
from impala_vllm.core.types import TraceId
from impala_vllm.transfer.limits import Limits, staging_bytes
from tests.adapters.vllm.tiers.moving_bytes import CHUNK_BYTES, Disk, Host, Worker, WorkerJob
from tests.transfer.virtual import ManualClock

TOKENS = 32
A, B, C = TraceId("a"), TraceId("b"), TraceId("c")
END_OF_STEP = ScheduleEndContext((), ())


def keys(name: str, number: int, group: int = 0) -> list[OffloadKey]:
    return [make_offload_key(f"{name}{i:04}".encode(), group) for i in range(number)]


def names(some: Any) -> list[str]:
    return [get_offload_block_hash(key).decode() for key in some]


@dataclass
class Request:
    """What the connector knows of one."""

    req_id: str
    keys: list[OffloadKey]
    context: ReqContext
    trace_id: TraceId | None
    num_computed: int = 0
    jobs: dict[int, WorkerJob] = field(default_factory=dict)
    is_over: bool = False


class Tiers:
    """A manager with memory, a worker and a disk, and the connector's verbs."""

    def __init__(self, host: int, nvme: int = 0, policy: bool = True, events: bool = False) -> None:
        self.clock = ManualClock()
        self.memory = Host(host)
        self.worker = Worker(self.memory)
        self.disk = Disk(nvme, self.clock)
        self.nvme = NvmeTier(self.disk, nvme, {}, self.memory.row, CHUNK_BYTES) if nvme else None  # type: ignore[arg-type]
        self.manager = TierManager(host, CHUNK_BYTES, TOKENS, self.nvme, self.clock, events)
        self.gaps, cost = GapForecast(), StepCost()
        self.planner = Planner(cost, CHUNK_BYTES / TOKENS, PlannerConfig(choose_loads=False))
        self.idle = IdleKv(self.gaps, Admission(cost, 300.0), Retention(cost), self.planner)
        if policy:
            self.manager.attach(self.idle, self.planner)
        self.requests: dict[str, Request] = {}
        self.has_policy = policy
        self._num_jobs = 0

    def arrive(self, req_id: str, prompt: list[OffloadKey], trace_id: TraceId | None = None, **told: Any) -> Request:
        request = Request(req_id, prompt, ReqContext(req_id), trace_id)
        self.requests[req_id] = request
        self._name(request)
        if self.has_policy:
            self.manager.arrive(req_id, trace_id, prompt, told.get("stem", 0), told.get("writes", True))
            self.turn(req_id).awaited_chunks = len(prompt)
        self.manager.on_new_request(request.context)
        return request

    def turn(self, req_id: str) -> Turn:
        turn = self.manager.turns.get(req_id)
        assert turn is not None
        return turn

    def lookup(self, request: Request) -> int | None:
        """Leading chunks to load; None: ask again later."""
        found, is_pending = 0, False
        for key in request.keys:
            result = self.manager.lookup(key, request.context)
            if result is LookupResult.MISS:
                break
            found += 1
            is_pending |= result is LookupResult.HIT_PENDING
        return None if is_pending else found

    def load(self, request: Request, number: int) -> int:
        """Start to load the leading chunks. Returns the job."""
        spec: Any = self.manager.prepare_load(request.keys[:number], request.context)
        request.num_computed = number
        return self._started(request, self.worker.start(False, request.keys[:number], spec.block_ids))

    def compute(self, request: Request, number: int) -> int | None:
        """Compute and offer the next chunks. Returns the job; None: all are here, or there is no room."""
        offered = request.keys[request.num_computed : request.num_computed + number]
        request.num_computed += len(offered)
        output = self.manager.prepare_store(offered, request.context)
        assert output is not None, "vLLM would ask again each step"
        assert set(output.keys_to_store) <= set(offered)
        if not output.keys_to_store:
            return None
        spec: Any = output.store_spec
        return self._started(request, self.worker.start(True, output.keys_to_store, spec.block_ids))

    def complete(self, request: Request, number: int) -> None:
        job = request.jobs.pop(number)
        self.worker.end(job)
        complete = self.manager.complete_store if job.is_store else self.manager.complete_load
        loaded_or_stored: Any = set(job.slots)
        complete(loaded_or_stored, request.context)

    def finish(self, request: Request, output: list[OffloadKey] | None = None, **told: Any) -> None:
        """The request ends; what it still stores is on its way."""
        request.keys = request.keys + (output or [])
        self._name(request)
        request.is_over = True
        if self.has_policy:
            self.manager.finish(request.req_id, request.keys, told.get("stem", 0), told.get("writes", True))
        if output:
            self.compute(request, len(output))
        self.manager.on_request_finished(request.context)

    def serve(self, req_id: str, prompt: list[OffloadKey], trace_id: TraceId | None = None, **told: Any) -> Request:
        """A whole turn: everything computed, nothing loaded."""
        request = self.arrive(req_id, prompt, trace_id, **told)
        self.compute(request, len(prompt))
        self.finish(request, **told)
        self.settle(request)
        return request

    def settle(self, request: Request) -> None:
        for number in list(request.jobs):
            self.complete(request, number)

    def step(self, seconds: float = 0.0) -> None:
        self.clock.advance(seconds)
        self.manager.on_schedule_end(END_OF_STEP)

    def reset(self) -> None:
        """As the connector does it: the worker ends what it has, nobody is told."""
        for request in self.requests.values():
            if request.is_over and request.jobs:
                self.manager.on_request_finished(request.context)
        self.manager.reset_cache()
        for request in self.requests.values():
            for job in request.jobs.values():
                self.worker.end(job)
            request.jobs.clear()

    def check(self) -> None:
        """Pools and chains add up, and every ready chunk has its own bytes."""
        self._check(self.manager.host, self.manager.chains)
        for key in list(self.manager.host.keys()):
            slot = self.manager.host.slot(key)
            assert slot is not None
            assert not self.manager.host.is_ready(key) or self.memory.holds(slot, key)
        if self.nvme is None:
            return
        self._check(self.nvme.pool, self.nvme.chains)
        for key in list(self.nvme.pool.keys()):
            held = self.disk.slots[self.nvme.pool.slot(key) or 0]
            assert not self.nvme.pool.is_ready(key) or (held is not None and held[0] == key)

    def check_nothing_moves(self) -> None:
        """Nobody is here and all jobs are done: nothing of them is left anywhere."""
        self.check()
        manager = self.manager
        for pool in (manager.host, *([self.nvme.pool] if self.nvme is not None else [])):
            assert pool.num_free + len(pool) == pool.num_slots, "a slot is lost"
            assert all(pool.is_evictable(key) for key in list(pool.keys()))
        assert not manager.turns._open
        if self.has_policy:
            assert self.planner.host.queued_bytes == 0
            assert self.planner.nvme.queued_bytes == 0
        if self.nvme is not None:
            assert not self.nvme._moves
            assert self.nvme.promoted <= set(manager.host.keys())

    def _started(self, request: Request, job: WorkerJob) -> int:
        self._num_jobs += 1
        request.jobs[self._num_jobs] = job
        return self._num_jobs

    @staticmethod
    def _name(request: Request) -> None:
        for index, key in enumerate(request.keys, start=1):
            request.context.set_offload_key_position(key, index * TOKENS)

    @staticmethod
    def _check(pool: SlotPool, chains: Chains) -> None:
        pool.check_invariants()
        chains.check_invariants()
        ready = [key for key in list(pool.keys()) if pool.is_ready(key)]
        assert len(chains) == len(ready)
        assert all(key in chains for key in ready)


# One thing at a time.


def test_what_was_stored_is_loaded_by_the_next_turn() -> None:
    tiers = Tiers(8)
    tiers.serve("r", keys("a", 3), A)
    follower = tiers.arrive("s", keys("a", 5), A)
    assert tiers.lookup(follower) == 3
    job = tiers.load(follower, 3)
    assert not tiers.manager.host.is_evictable(keys("a", 1)[0])
    tiers.complete(follower, job)
    tiers.finish(follower)
    tiers.check_nothing_moves()
    assert (tiers.manager.num_stored, tiers.manager.loads.num_chunks) == (3, 3)


def test_a_turn_makes_room_from_what_is_worth_least_and_keeps_its_own() -> None:
    tiers = full_host()
    tiers.idle.update(C, 2, 2 * TOKENS, True, tiers.clock(), is_running=True)
    tiers.serve("t", keys("c", 2), C)
    assert names(tiers.manager.host.keys()) == ["a0000", "a0001", "a0002", "b0000", "c0000", "c0001"]
    assert tiers.manager.num_evicted == 2


def test_with_nothing_below_host_a_turn_takes_no_room_from_what_is_worth_as_much() -> None:
    tiers = full_host()  # nothing is known of C
    tiers.serve("t", keys("c", 2), C)
    assert names(tiers.manager.host.keys()) == names(keys("a", 3) + keys("b", 3))
    assert (tiers.manager.num_evicted, tiers.manager.num_refused) == (0, 2)
    tiers.manager.forget(B)
    tiers.serve("u", keys("c", 2), C)
    assert names(tiers.manager.host.keys()) == ["a0000", "a0001", "a0002", "b0000", "c0000", "c0001"]


def test_with_nvme_below_a_turn_takes_host_room_whatever_it_is_worth() -> None:
    tiers = full_host(nvme=8)
    tiers.serve("t", keys("c", 2), C)
    assert tiers.manager.num_refused == 0


def full_host(nvme: int = 0) -> Tiers:
    """Six chunks: three of A, and three of B, which is not expected back."""
    tiers = Tiers(6, nvme)
    tiers.serve("r", keys("a", 3), A)
    tiers.serve("s", keys("b", 3), B)
    tiers.step(1.0)
    tiers.gaps.finish(A, tiers.clock())
    for trace_id in (A, B):
        tiers.idle.update(trace_id, 0, 3 * TOKENS, False, tiers.clock(), Below(3 * TOKENS))
    return tiers


def test_a_prompt_longer_than_host_keeps_its_root_and_is_refused_its_tail() -> None:
    for trace_id in (A, None):
        tiers = Tiers(4)
        request = tiers.arrive("r", keys("a", 7), trace_id)
        for _ in range(7):
            tiers.compute(request, 1)
            tiers.settle(request)
        tiers.finish(request)
        assert names(tiers.manager.host.keys()) == names(keys("a", 4))
        assert tiers.manager.num_refused == 3
        tiers.check_nothing_moves()


def test_a_chunk_that_another_request_still_stores_is_not_promised_and_not_stored_twice() -> None:
    tiers = Tiers(8)
    first, second = tiers.arrive("r", keys("a", 2), A), tiers.arrive("s", keys("a", 2), B)
    job = tiers.compute(first, 2)
    assert job is not None
    assert tiers.lookup(second) == 0
    assert tiers.compute(second, 2) is None
    tiers.complete(first, job)
    assert tiers.manager.host.is_ready(keys("a", 1)[0])


def test_a_trace_that_is_forgotten_while_its_turn_runs_leaves_nothing_behind() -> None:
    tiers = Tiers(8, nvme=8)
    request = tiers.arrive("r", keys("a", 4), A)
    tiers.compute(request, 2)
    tiers.settle(request)
    tiers.manager.forget(A)
    tiers.compute(request, 2)
    tiers.finish(request)
    tiers.settle(request)
    tiers.step(1.0)
    tiers.check_nothing_moves()
    assert not tiers.manager.turns.keys_of(A)
    assert tiers.manager.chains._chains == {}
    assert tiers.nvme is not None
    assert tiers.nvme.chains._chains == {}


def test_an_abort_during_a_load_keeps_the_slots_until_the_load_is_over() -> None:
    tiers = Tiers(2)
    tiers.serve("r", keys("a", 2), A)
    request = tiers.arrive("s", keys("a", 2), A)
    job = tiers.load(request, 2)
    tiers.finish(request)
    other = tiers.arrive("t", keys("b", 2), B)
    assert tiers.compute(other, 2) is None
    tiers.complete(request, job)
    assert tiers.manager.turns.get("s") is None
    tiers.finish(other)
    tiers.check_nothing_moves()


def test_writes_go_on_to_nvme_as_they_are_stored_where_the_turn_says_so() -> None:
    tiers = Tiers(8, nvme=8)
    tiers.serve("r", keys("a", 3), A, writes=True)
    tiers.serve("s", keys("b", 3), B, writes=False)
    tiers.step(1.0)
    assert tiers.nvme is not None
    assert names(tiers.nvme.pool.keys()) == names(keys("a", 3))


def undecided(tiers: Tiers, answers: list[bool | None]) -> Request:
    """A first turn of A that has stored two chunks, while it was asked in vain whether it writes."""
    request = tiers.arrive("r", keys("a", 3), A, writes=False)
    tiers.turn("r").may_write = lambda: answers[0]
    tiers.manager.turns.undecided.add(A)
    tiers.compute(request, 2)
    tiers.settle(request)
    return request


def test_what_may_have_to_be_written_goes_last_in_host_until_the_turn_ends() -> None:
    tiers = Tiers(4, nvme=8)
    request = undecided(tiers, [None])
    tiers.serve("s", keys("b", 2), B)
    tiers.step(1.0)
    tiers.idle.update(A, 0, 2 * TOKENS, False, tiers.clock())  # worth nothing, B is as dear as can be
    tiers.idle.update(B, 0, 2 * TOKENS, True, tiers.clock(), Below(2 * TOKENS), is_running=True)
    tiers.serve("u", keys("d", 2), TraceId("d"))
    assert names(tiers.manager.host.keys()) == names(keys("a", 2) + keys("d", 2))
    tiers.finish(request, writes=True)
    tiers.step(1.0)
    assert tiers.nvme is not None
    assert set(keys("a", 2)) <= set(tiers.nvme.pool.keys())
    tiers.serve("t", keys("c", 4), C)
    assert names(tiers.manager.host.keys()) == names(keys("c", 4))


def test_first_turns_of_an_unknown_kind_do_not_keep_host_from_others() -> None:
    tiers = Tiers(4, nvme=8)
    for trace_id in (A, B):
        request = tiers.arrive(f"r-{trace_id}", keys(trace_id, 2), trace_id, writes=False)
        tiers.turn(request.req_id).may_write = lambda: None
        tiers.manager.turns.undecided.add(trace_id)
        tiers.compute(request, 2)
        tiers.settle(request)
    prompt = on_nvme(tiers, "c", 2, C)
    assert tiers.manager.num_refused == 0
    tiers.serve("d", keys("d", 4), TraceId("d"), writes=False)
    assert promote(tiers, tiers.arrive("s", prompt, C))


@pytest.mark.parametrize(("answer", "number"), [(True, 3), (False, 0)])
def test_a_turn_whose_kind_shows_what_it_does_meanwhile_is_decided(answer: bool, number: int) -> None:
    tiers = Tiers(4, nvme=8)
    answers: list[bool | None] = [None]
    request = undecided(tiers, answers)
    answers[0] = answer
    tiers.compute(request, 1)
    tiers.settle(request)
    assert not tiers.manager.turns.undecided
    tiers.step(1.0)
    assert tiers.nvme is not None
    assert len(tiers.nvme.pool) == number


def test_a_trace_that_is_forgotten_is_undecided_no_more() -> None:
    tiers = Tiers(4, nvme=8)
    request = undecided(tiers, [None])
    tiers.manager.forget(A)
    assert not tiers.manager.turns.undecided
    tiers.finish(request, writes=False)
    tiers.check_nothing_moves()


def test_a_turn_that_is_worth_it_only_at_its_end_is_written_then() -> None:
    tiers = Tiers(8, nvme=8)
    request = tiers.arrive("r", keys("a", 3), A, writes=False)
    tiers.compute(request, 3)
    tiers.settle(request)
    tiers.finish(request, keys("a-out", 1), writes=True)
    tiers.settle(request)
    tiers.step(1.0)
    assert tiers.nvme is not None
    assert len(tiers.nvme.pool) == 4
    tiers.check_nothing_moves()


def on_nvme(tiers: Tiers, name: str, number: int, trace_id: TraceId = A) -> list[OffloadKey]:
    """Chunks of a trace that NVMe has and host does not."""
    tiers.serve(name, keys(name, number), trace_id)
    tiers.step(1.0)
    host = tiers.manager.host
    tiers.manager._evict([key for key in keys(name, number) if host.is_ready(key)])
    return keys(name, number)


def promote(tiers: Tiers, request: Request, ahead: Any = ()) -> bool:
    """As policy does it for a turn that waits."""
    assert tiers.nvme is not None
    wanted = [key for key in request.keys if key not in tiers.manager.host]
    mine = set(request.keys).__contains__
    return tiers.nvme.promote(wanted, request.trace_id, tiers.clock(), mine, ahead)


def test_what_nvme_has_is_read_into_host_before_it_is_promised() -> None:
    tiers = Tiers(4, nvme=8)
    prompt = on_nvme(tiers, "a", 3)
    request = tiers.arrive("r", prompt, A)
    assert tiers.lookup(request) == 0
    assert promote(tiers, request)
    assert tiers.lookup(request) is None
    tiers.step(1.0)
    assert tiers.lookup(request) == 3
    assert tiers.manager.get_load_source(prompt[0], request.context) is CacheHitSource.DISK
    tiers.complete(request, tiers.load(request, 3))
    assert tiers.manager.get_load_source(prompt[0], request.context) is CacheHitSource.HOST
    tiers.finish(request)
    tiers.check_nothing_moves()


def test_a_chunk_keeps_its_place_on_nvme_while_it_is_read() -> None:
    tiers = Tiers(8, nvme=4)
    request = tiers.arrive("r", on_nvme(tiers, "a", 4), A)
    tiers.disk._seconds = 10.0
    promote(tiers, request)
    tiers.manager.forget(A)  # worth nothing, but still being read
    tiers.serve("s", keys("b", 2), B)
    assert tiers.nvme is not None
    assert names(tiers.nvme.pool.keys()) == names(request.keys)
    assert tiers.nvme.num_unplaced == 2
    tiers.finish(request)
    tiers.step(10.0)
    tiers.check_nothing_moves()


def test_a_read_that_is_late_is_not_waited_for() -> None:
    tiers = Tiers(4, nvme=8)
    request = tiers.arrive("r", on_nvme(tiers, "a", 3), A)
    tiers.disk._seconds = 1000.0
    promote(tiers, request)
    tiers.clock.advance(LATE_S + 0.1)
    assert tiers.lookup(request) == 0
    assert tiers.compute(request, 3) is None, "its slots are still being filled"
    tiers.finish(request)
    tiers.step(1000.0)
    tiers.check_nothing_moves()


def test_a_chunk_that_cannot_be_read_is_a_miss_and_forgotten() -> None:
    tiers = Tiers(4, nvme=8)
    prompt = on_nvme(tiers, "a", 3)
    tiers.disk.fails = lambda key: key == prompt[1]
    request = tiers.arrive("r", prompt, A)
    promote(tiers, request)
    tiers.step(1.0)
    assert tiers.nvme is not None
    assert tiers.lookup(request) == 1
    assert prompt[1] not in tiers.nvme.here
    assert prompt[2] in tiers.nvme.here
    assert tiers.nvme.num_failed == 1
    tiers.finish(request)
    tiers.check_nothing_moves()


def test_a_turn_that_waits_for_its_tail_does_not_evict_its_own_root() -> None:
    tiers = Tiers(4, nvme=8)
    prompt = on_nvme(tiers, "a", 8)
    request = tiers.arrive("r", prompt, None)  # nobody's: its chunks are the first to go
    assert promote(tiers, request)
    tiers.step(1.0)
    assert tiers.lookup(request) == 4
    assert not promote(tiers, request)
    assert tiers.lookup(request) == 4


def test_a_turn_does_not_evict_a_stem_of_its_own_either() -> None:
    tiers = Tiers(4, nvme=8)
    prompt = on_nvme(tiers, "a", 4)
    tiers.serve("r", prompt[:3], B, stem=3)  # stems beyond half of the tier are the first to go
    tiers.serve("s", keys("b", 1), B)
    tiers.step(1.0)
    request = tiers.arrive("t", prompt, A, stem=3)
    assert promote(tiers, request)
    tiers.step(1.0)
    assert tiers.lookup(request) == 4


def test_a_turn_larger_than_the_stores_queue_is_written_as_far_as_there_is_room(monkeypatch: Any) -> None:
    monkeypatch.setattr("impala_vllm.adapters.vllm.tiers.nvme.WRITE_BYTES", 2 * CHUNK_BYTES)
    tiers = Tiers(16, nvme=16)
    accept = tiers.disk.submit_write
    tiers.disk.submit_write = lambda *job: tiers.disk.num_jobs < 3 and accept(*job)  # type: ignore[method-assign]
    tiers.serve("r", keys("a", 9), A)
    tiers.step(1.0)
    assert tiers.nvme is not None
    assert names(tiers.nvme.pool.keys()) == names(keys("a", 6))
    tiers.finish(tiers.arrive("s", keys("a", 9), A))
    tiers.step(1.0)
    assert len(tiers.nvme.pool) == 9
    tiers.check_nothing_moves()


def test_what_was_written_today_is_told() -> None:
    tiers = Tiers(4, nvme=8)
    tiers.disk.write_bytes_today = 5
    assert tiers.manager.stats()["nvme_write_today_bytes"] == 5.0


def test_what_waits_for_a_slow_disk_leaves_host_to_others() -> None:
    tiers = Tiers(64, nvme=256)
    tiers.disk.limits = Limits(max_queued_write_bytes=staging_bytes(64 * CHUNK_BYTES, CHUNK_BYTES))
    tiers.disk._seconds = 1000.0
    for i in range(8):
        tiers.serve(f"r{i}", keys(f"a{i}-", 32), TraceId(f"a{i}"))
    host = tiers.manager.host
    assert sum(not host.is_evictable(key) for key in list(host.keys())) == 16
    assert tiers.manager.num_refused == 0
    assert tiers.disk.num_jobs == 1
    held = set(host.ready)
    for _ in range(9):
        tiers.step(1000.0)
    assert tiers.nvme is not None
    assert held <= set(tiers.nvme.here), "it is written when the disk has time"
    assert not tiers.disk.num_jobs


def test_a_disk_that_takes_no_writes_does_not_empty_the_tier(monkeypatch: Any) -> None:
    monkeypatch.setattr("impala_vllm.adapters.vllm.tiers.nvme.WRITE_BYTES", 2 * CHUNK_BYTES)
    tiers = Tiers(64, nvme=8)
    tiers.serve("r", keys("a", 8), A)
    tiers.step(1.0)
    tiers.manager.forget(A)  # worth nothing: whoever comes may have its room
    tiers.disk.is_full = True
    for i in range(5):
        tiers.serve(f"t{i}", keys(f"c{i}-", 8), TraceId(f"c{i}"))
    assert tiers.nvme is not None
    assert len(tiers.nvme.pool) == 6
    tiers.disk.is_full = False
    tiers.serve("u", keys("d", 4), TraceId("d"))
    tiers.step(1.0)
    assert all(key in tiers.nvme.here for key in keys("d", 4))
    tiers.check_nothing_moves()


def test_a_reset_forgets_everything_and_gives_back_every_slot_when_its_bytes_have_stopped() -> None:
    tiers = Tiers(4, nvme=4)
    prompt = on_nvme(tiers, "a", 2)
    tiers.serve("s", keys("b", 2), B)  # being written
    request = tiers.arrive("r", prompt, A)
    promote(tiers, request)  # being read
    tiers.reset()
    tiers.check()
    assert tiers.lookup(request) == 0
    assert (len(tiers.manager.host), tiers.manager.host.num_free) == (0, 0)
    tiers.finish(request)
    tiers.step(1.0)
    tiers.check_nothing_moves()
    assert (tiers.manager.host.num_free, tiers.manager.turns.changed_traces.keys()) == (4, {A, B})


def test_a_second_reset_while_the_first_ones_bytes_still_move_loses_no_slot() -> None:
    tiers = Tiers(4, nvme=4)
    tiers.disk._seconds = 10.0
    tiers.serve("r", keys("a", 2), A)  # being written
    tiers.reset()
    tiers.serve("s", keys("a", 2), A, writes=False)  # the same chunks in other slots, which nobody reads
    tiers.reset()
    tiers.check()
    tiers.step(10.0)
    tiers.check_nothing_moves()
    assert tiers.manager.host.num_free == 4


def test_the_speed_of_a_link_is_that_of_all_workers_together() -> None:
    tiers = Tiers(8)
    tiers.serve("r", keys("a", 4), A)
    request = tiers.arrive("s", keys("a", 4), A)
    job = tiers.load(request, 4)
    assert tiers.planner.host.queued_bytes == 4 * CHUNK_BYTES
    tiers.manager.loads.took(0.25)  # half of the workers are done in this step, half in the next
    tiers.manager.loads.took(0.25)
    tiers.complete(request, job)
    tiers.manager.loads.took(0.0)
    assert tiers.planner.host.bytes_per_s == pytest.approx(4 * CHUNK_BYTES / 0.5)
    assert tiers.planner.host.queued_bytes == 0


def test_what_comes_and_goes_is_told_as_events_promotions_too() -> None:
    tiers = Tiers(4, nvme=8, events=True)
    prompt = on_nvme(tiers, "a", 2)
    request = tiers.arrive("r", prompt, A)
    promote(tiers, request)
    tiers.step(1.0)
    told = [(event.medium, event.removed, names(sorted(event.keys))) for event in tiers.manager.take_events()]
    assert told == [(Medium.CPU, removed, names(prompt)) for removed in (False, True, False)]
    assert list(tiers.manager.take_events()) == []


# After a restart.


def restarted(tiers: Tiers) -> NvmeTier:
    """What the next process makes of the slab."""
    disk: Any = tiers.disk
    recovered, _ = tiers.disk.records.by_key()
    return NvmeTier(disk, len(tiers.disk.slots), recovered, tiers.memory.row, CHUNK_BYTES)


def spared_last(tier: NvmeTier) -> list[str]:
    return names(tier.chains.victims(len(tier.pool), tier.pool.evictable))[::-1]


def grown(tiers: Tiers, num_outputs: int = 3) -> None:
    """A, then B, have two turns each behind a stem; what they put out is stored bit by bit."""
    for trace_id in (A, B):
        history = keys("stem", 2)
        for turn in range(2):
            history = history + keys(f"{trace_id}-in{turn}-", 2)
            request = tiers.arrive(f"{trace_id}{turn}", history, trace_id, stem=2)
            tiers.compute(request, len(history))
            tiers.settle(request)
            for i in range(num_outputs):
                request.keys = request.keys + keys(f"{trace_id}-out{turn}-{i}-", 1)
                tiers._name(request)
                tiers.compute(request, 1)
                tiers.settle(request)
                tiers.step(1.0)
            tiers.finish(request, stem=2)
            tiers.step(1.0)
            history = request.keys


@pytest.mark.parametrize("policy", [True, False])
def test_after_a_restart_the_trace_silent_longest_goes_first_and_every_trace_from_its_tail(policy: bool) -> None:
    tiers = Tiers(64, nvme=64, policy=policy)
    grown(tiers)
    newest, oldest = (tiers.requests[f"{trace_id}1"].keys for trace_id in (B, A))
    assert spared_last(restarted(tiers)) == names(newest) + names(oldest[2:])


def test_pressure_after_a_restart_leaves_no_islands() -> None:
    tiers = Tiers(64, nvme=64)
    grown(tiers)
    chains = [names(tiers.requests[f"{trace_id}1"].keys) for trace_id in (A, B)]
    order = spared_last(restarted(tiers))
    for number in range(len(order)):
        left = set(order[:number])
        for chain in chains:
            held = [name in left for name in chain]
            assert held == sorted(held, reverse=True), "a root has gone before its tail"


# Without policy.


def test_a_plain_cache_keeps_what_was_used_last_and_evicts_a_prompt_from_its_tail() -> None:
    tiers = Tiers(8, policy=False)
    tiers.serve("r", keys("a", 4))
    tiers.serve("s", keys("b", 4))
    request = tiers.arrive("t", keys("a", 4))
    tiers.complete(request, tiers.load(request, 4))
    tiers.finish(request)
    tiers.serve("u", keys("c", 3))
    assert names(tiers.manager.host.keys()) == [*names(keys("a", 4)), "b0000", *names(keys("c", 3))]


def test_a_plain_cache_of_several_groups_does_the_same() -> None:
    tiers = Tiers(8, policy=False)
    request = tiers.arrive("r", keys("a", 2, 0) + keys("a", 2, 1))
    for _ in range(2):
        tiers.compute(request, 2)
        tiers.settle(request)
    tiers.finish(request)
    tiers.serve("s", keys("b", 6))
    assert len(tiers.manager.host) == 8
    tiers.check_nothing_moves()


def test_a_plain_cache_writes_everything_through() -> None:
    tiers = Tiers(8, nvme=8, policy=False)
    request = tiers.arrive("r", keys("a", 4))
    for _ in range(4):
        tiers.compute(request, 1)
        tiers.settle(request)
    tiers.finish(request)
    tiers.step(1.0)
    assert tiers.nvme is not None
    assert len(tiers.nvme.pool) == 4


def test_a_plain_cache_serves_a_prompt_that_is_longer_than_host() -> None:
    tiers = Tiers(8, nvme=16, policy=False)
    tiers.has_policy = False
    prompt = keys("a", 12)
    for start in (0, 6):  # on NVMe as a whole, in two visits
        request = tiers.arrive(f"r{start}", prompt[start : start + 6])
        tiers.compute(request, 6)
        tiers.finish(request)
        tiers.settle(request)
        tiers.step(1.0)
        tiers.manager._evict([key for key in prompt if tiers.manager.host.is_ready(key)])
    request = tiers.arrive("s", prompt)
    found = None
    for _ in range(20):
        found = tiers.lookup(request)
        if found is not None:
            break
        tiers.step(0.2)
    assert found == 8
    tiers.complete(request, tiers.load(request, 8))
    tiers.finish(request)
    tiers.step(1.0)
    tiers.check_nothing_moves()


def test_when_policy_is_gone_nothing_is_any_traces() -> None:
    tiers = Tiers(6, nvme=6)
    tiers.serve("r", keys("a", 3), A)
    request = tiers.arrive("s", keys("b", 3), B)
    tiers.compute(request, 3)
    tiers.manager.detach()
    tiers.has_policy = False
    tiers.finish(request)
    tiers.settle(request)
    tiers.step(1.0)
    tiers.serve("t", keys("c", 3))
    assert sorted(names(tiers.manager.host.keys())) == names([*keys("b", 3), *keys("c", 3)])
    assert not tiers.manager.turns.changed_traces
    tiers.step(1.0)
    tiers.check_nothing_moves()


# Everything at once.


class Storm:
    """Random verbs, in any order in which the connector could issue them."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.tiers = Tiers(rng.choice([3, 8, 20]), rng.choice([0, 5, 40]), policy=rng.random() < 0.8)
        self.tiers.disk.fails = lambda key: rng.random() < 0.05
        self.tiers.disk._seconds = rng.choice([0.02, 0.1, 3.0])
        self.histories = {TraceId(f"t{i}"): keys(f"stem{i % 2}-", rng.randrange(3)) for i in range(5)}
        self._num = 0

    def run(self, num_ops: int) -> None:
        verbs = {
            self.come: 6,
            self.begin: 12,
            self.compute: 14,
            self.complete: 16,
            self.end: 5,
            self.preempt: 2,
            self.trouble: 1,
            self.forget: 1,
            self.reset: 1,
            self.lose_policy: 0.1,
        }
        for _ in range(num_ops):
            self.rng.choices([*verbs], [*verbs.values()])[0]()
            if self.rng.random() < 0.5:
                self.tiers.step(self.rng.choice([0.0, 0.02, 0.2, 1.5]))
            self.tiers.check()
        self.tiers.disk.is_open = self.tiers.disk.is_full = False
        for request in list(self.tiers.requests.values()):
            if not request.is_over:
                self.tiers.finish(request)
            self.tiers.settle(request)
        for _ in range(2):  # what ends may be written
            self.tiers.step(3.0)
        self.tiers.check_nothing_moves()

    def come(self) -> None:
        trace_id = self.rng.choice([*self.histories])
        history = self.histories[trace_id]
        self._num += 1
        if self.rng.random() < 0.15:
            history = history[: self.rng.randrange(len(history) + 1)]  # compacted, or an older point
        self.histories[trace_id] = history = history + keys(f"turn{self._num}-", self.rng.randrange(1, 5))
        told = {"stem": self.rng.randrange(3), "writes": self.rng.random() < 0.7}
        self.tiers.arrive(f"r{self._num}", history, trace_id if self.rng.random() < 0.9 else None, **told)

    def begin(self) -> None:
        request = self._some(lambda r: not r.jobs and not r.num_computed)
        if request is None:
            return
        nvme = self.tiers.nvme
        if nvme is not None and self.tiers.has_policy and self.rng.random() < 0.7:
            promote(self.tiers, request, self.rng.sample([*self.histories], self.rng.randrange(3)))
        found = self.tiers.lookup(request)
        if found:
            self.tiers.load(request, found)
        elif found == 0:
            self.tiers.compute(request, self.rng.randrange(1, 4))

    def compute(self) -> None:
        request = self._some(lambda r: r.num_computed and not any(not job.is_store for job in r.jobs.values()))
        if request is not None:
            self.tiers.compute(request, self.rng.randrange(1, 4))

    def complete(self) -> None:
        moving = [(r, number) for r in self.tiers.requests.values() for number in r.jobs]
        if moving:
            self.tiers.complete(*self.rng.choice(moving))

    def end(self) -> None:
        """Finished, or aborted: a load may be under way."""
        request = self._some(lambda r: True)
        if request is not None:
            loads = any(not job.is_store for job in request.jobs.values())
            output = keys(f"out{request.req_id}-", self.rng.randrange(2)) if not loads else []
            self.tiers.finish(request, output, writes=self.rng.random() < 0.7)

    def preempt(self) -> None:
        request = self._some(lambda r: r.num_computed and not any(not job.is_store for job in r.jobs.values()))
        if request is not None:
            for number in list(request.jobs):
                self.tiers.complete(request, number)
            request.num_computed = 0

    def trouble(self) -> None:
        self.tiers.disk.is_open = self.rng.random() < 0.3
        self.tiers.disk.is_full = self.rng.random() < 0.3

    def forget(self) -> None:
        if self.tiers.has_policy:
            self.tiers.manager.forget(self.rng.choice([*self.histories]))

    def reset(self) -> None:
        self.tiers.reset()
        for request in self.tiers.requests.values():
            request.num_computed = 0

    def lose_policy(self) -> None:
        self.tiers.manager.detach()
        self.tiers.has_policy = False
        for request in self.tiers.requests.values():
            request.trace_id = None

    def _some(self, may: Any) -> Request | None:
        found = [request for request in self.tiers.requests.values() if not request.is_over and may(request)]
        return self.rng.choice(found) if found else None


@pytest.mark.parametrize("seed", range(40))
def test_no_order_of_events_gives_a_slot_two_owners_or_loses_one(seed: int) -> None:
    Storm(seed).run(150)

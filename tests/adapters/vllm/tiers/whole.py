"""Host and NVMe below a scheduler that is played: the manager, its policy, a worker and a disk that move real bytes."""

from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadKey,
    ReqContext,
    ScheduleEndContext,
    TierFilter,
    get_offload_block_hash,
    make_offload_key,
)

from impala_vllm.adapters.vllm.tiers.manager import TierManager
from impala_vllm.adapters.vllm.tiers.nvme import NvmeTier
from impala_vllm.adapters.vllm.tiers.turns import Turn
from impala_vllm.core.admission import Admission
from impala_vllm.core.allocator import SlotPool
from impala_vllm.core.chains import Chains
from impala_vllm.core.cost import StepCost
from impala_vllm.core.gaps import GapForecast
from impala_vllm.core.idle import IdleKv
from impala_vllm.core.planner import Planner, PlannerConfig
from impala_vllm.core.retention import Retention
from impala_vllm.core.types import TraceId
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
        context = ReqContext(req_id, load_tier_filter=told.get("load_from", TierFilter.ALL))
        request = Request(req_id, prompt, context, trace_id)
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
        self._check(self.manager.host.pool, self.manager.host.chains)
        for key in list(self.manager.host.pool.keys()):
            slot = self.manager.host.pool.slot(key)
            assert slot is not None
            assert not self.manager.host.pool.is_ready(key) or self.memory.holds(slot, key)
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
        for pool in (manager.host.pool, *([self.nvme.pool] if self.nvme is not None else [])):
            assert pool.num_free + len(pool) == pool.num_slots, "a slot is lost"
            assert all(pool.is_evictable(key) for key in list(pool.keys()))
        assert not manager.turns._open
        if self.has_policy:
            assert self.planner.host.queued_bytes == 0
            assert self.planner.nvme.queued_bytes == 0
        if self.nvme is not None:
            assert not self.nvme._moves
            assert self.nvme.promoted <= set(manager.host.pool.keys())

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


def on_nvme(tiers: Tiers, name: str, number: int, trace_id: TraceId = A) -> list[OffloadKey]:
    """Chunks of a trace that NVMe has and host does not."""
    tiers.serve(name, keys(name, number), trace_id)
    tiers.step(1.0)
    host = tiers.manager.host.pool
    tiers.manager.host.evict([key for key in keys(name, number) if host.is_ready(key)])
    return keys(name, number)


def promote(tiers: Tiers, request: Request, ahead: Any = ()) -> bool:
    """As policy does it for a turn that waits."""
    assert tiers.nvme is not None
    wanted = [key for key in request.keys if key not in tiers.manager.host.pool]
    mine = dict.fromkeys(request.keys, 0).get
    return tiers.nvme.promote(wanted, request.trace_id, tiers.clock(), mine, ahead)

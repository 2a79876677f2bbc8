"""Tiers below HBM in virtual time: the managers that decide are the real ones, ours or vLLM's, and links are rates.

No bytes move. A link takes one job after the other in each direction; host and NVMe have a link each. vLLM's own tiers
get the same slots and the same rates.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingManager,
    OffloadingSpec,
    OffloadingWorker,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager
from vllm.v1.outputs import KVConnectorOutput

from impala_vllm.adapters.vllm.tiers.manager import TierManager
from impala_vllm.adapters.vllm.tiers.nvme import NvmeTier
from impala_vllm.transfer.counters import Counters
from impala_vllm.transfer.jobs import Item, Result
from impala_vllm.transfer.limits import Limits, staging_bytes

CHUNK_BYTES = 4096
"""Stands for a block's KV: only ratios count."""


@dataclass(frozen=True, slots=True)
class Tiers:
    """What lies below HBM. Rates are in blocks a second; None: infinitely fast."""

    manager: str
    """`impala`, or vLLM's `lru` or `arc`."""
    host_blocks: int
    nvme_blocks: int = 0
    """0: no such tier. vLLM's has no limit."""
    host_rate: float | None = None
    nvme_read_rate: float | None = None
    nvme_write_rate: float | None = None

    def connector(self) -> KVTransferConfig:
        """What makes vLLM build it."""
        return KVTransferConfig(
            kv_connector="OffloadingConnector",
            kv_role="kv_both",
            kv_connector_extra_config={
                "spec_name": "VirtualSpec",
                "spec_module_path": "benchmarks.virtual.tiers",
                "offload_prompt_only": False,
                "make_manager": self._manager,
            },
        )

    def _manager(self, tokens_per_block: int) -> OffloadingManager:
        now = asyncio.get_running_loop().time
        if self.manager == "impala":
            nvme = None
            if self.nvme_blocks:
                staging = staging_bytes(self.host_blocks * CHUNK_BYTES, CHUNK_BYTES)
                store: Any = VirtualStore(self.nvme_read_rate, self.nvme_write_rate, now, staging)
                nvme = NvmeTier(store, self.nvme_blocks, {}, lambda slot: memoryview(b""), CHUNK_BYTES)
            return TierManager(self.host_blocks, CHUNK_BYTES, tokens_per_block, nvme, clock=now)
        if not self.nvme_blocks:
            return CPUOffloadingManager(self.host_blocks, self.manager)
        region: Any = _Region(self.host_blocks)
        primary = CPUPrimaryTierOffloadingManager(self.host_blocks, region, self.manager)
        fs = VirtualFs(primary.get_kv_memoryview(), self.nvme_read_rate, self.nvme_write_rate, now)
        return TieringOffloadingManager(primary, [fs])


class VirtualSpec(OffloadingSpec):
    """Gives the connector the manager that `Tiers` made."""

    def get_manager(self) -> OffloadingManager:
        return self.extra_config["make_manager"](self.tokens_per_block[0])

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        raise NotImplementedError("there is no worker process in virtual time")


class Line:
    """One direction of a link: jobs one after the other at a rate."""

    def __init__(self, rate: float | None, now: Callable[[], float]) -> None:
        self._rate, self._now = rate, now
        self._free_s = 0.0
        self._jobs: deque[tuple[float, float, Any]] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def send(self, job: Any, num_blocks: int) -> None:
        took_s = num_blocks / self._rate if self._rate else 0.0
        self._free_s = max(self._free_s, self._now()) + took_s
        self._jobs.append((self._free_s, took_s, job))

    def done(self) -> Iterable[tuple[Any, float]]:
        """Jobs that have arrived, and the seconds each took."""
        while self._jobs and self._jobs[0][0] <= self._now():
            _, took_s, job = self._jobs.popleft()
            yield job, took_s

    def left_s(self) -> float:
        """Until all that was sent has arrived."""
        return max(0.0, self._free_s - self._now())

    def cut(self, job_id: int) -> float:
        """Do no more of a job, a pair that starts with its id; those behind it come sooner. Returns the share done."""
        index = next(i for i, (_, _, job) in enumerate(self._jobs) if job[0] == job_id)
        end_s, took_s, job = self._jobs[index]
        saved_s = min(took_s, max(0.0, end_s - self._now()))
        for i in range(index, len(self._jobs)):
            self._jobs[i] = (self._jobs[i][0] - saved_s, *self._jobs[i][1:])
        self._jobs[index] = (end_s - saved_s, took_s - saved_s, job)
        self._free_s -= saved_s
        return 1.0 - saved_s / took_s if took_s else 1.0


class VirtualWorker:
    """Carries out what the connector asks for, between HBM and host."""

    def __init__(self, rate: float | None, now: Callable[[], float]) -> None:
        self._loads, self._stores = Line(rate, now), Line(rate, now)
        self._deferred: list[tuple[int, int]] = []

    def start(self, scheduled: SchedulerOutput) -> None:
        """Loads of this step, and stores of the one before, as vLLM's worker does it."""
        meta: Any = scheduled.kv_connector_metadata
        for job_id, num_blocks in self._deferred:
            self._stores.send(job_id, num_blocks)
        self._deferred = [(i, len(job.src_spec.block_ids)) for i, job in meta.store_jobs.items()]
        for job_id, job in meta.load_jobs.items():
            self._loads.send((job_id, job.req_id, len(job.dst_spec.block_ids)), len(job.dst_spec.block_ids))

    def finished(self) -> KVConnectorOutput:
        meta = OffloadingWorkerMetadata()
        received: set[str] = set()
        for job_id, _ in self._stores.done():
            meta.mark_completed(job_id)
        for (job_id, req_id, num_blocks), took_s in self._loads.done():
            meta.mark_completed(job_id)
            meta.transfer_stats.load.record(num_blocks * CHUNK_BYTES, took_s)
            received.add(req_id)
        return KVConnectorOutput(finished_recving=received, kv_connector_worker_meta=meta)


class VirtualStore:
    """Stands for `NvmeStore`: the same verbs, a disk that is two lines."""

    def __init__(
        self,
        read_rate: float | None,
        write_rate: float | None,
        now: Callable[[], float],
        max_queued_write_bytes: int = 1 << 30,
    ) -> None:
        self.is_open = False
        self.counters = Counters()
        self.write_bytes_today = self.write_bytes_ever = 0
        self.read_bytes_per_s = read_rate * CHUNK_BYTES if read_rate else None
        self.limits = Limits(max_queued_write_bytes=max_queued_write_bytes, read_bytes_per_s=self.read_bytes_per_s)
        self.queued_write_bytes = 0
        self._reads, self._writes = Line(read_rate, now), Line(write_rate, now)
        self._shares: dict[int, float] = {}
        """Done of each read that was called back."""

    def submit_write(self, job_id: int, items: Sequence[Item]) -> bool:
        num_bytes = len(items) * CHUNK_BYTES
        if self.queued_write_bytes + num_bytes > self.limits.max_queued_write_bytes:
            return False
        self.queued_write_bytes += num_bytes
        self._writes.send((job_id, items), len(items))
        return True

    def submit_read(self, job_id: int, items: Sequence[Item]) -> None:
        self._reads.send((job_id, items), len(items))

    @property
    def queued_read_bytes(self) -> int:
        return int(self._reads.left_s() * (self.read_bytes_per_s or 0.0))

    def cancel(self, job_id: int) -> None:
        self._shares[job_id] = self._reads.cut(job_id)

    def forget(self, slots: Sequence[int]) -> None:
        """Nothing is on a disk."""

    def poll(self) -> list[Result]:
        found: list[Result] = []
        for is_write, line in ((True, self._writes), (False, self._reads)):
            for (job_id, items), took_s in line.done():
                keys = tuple(item.key for item in items)
                num_done = len(keys) if is_write else int(self._shares.pop(job_id, 1.0) * len(keys))
                num_bytes = num_done * CHUNK_BYTES
                found.append(Result(job_id, is_write, keys[:num_done], (), keys[num_done:], num_bytes, took_s))
                if is_write:
                    self.queued_write_bytes -= num_bytes
                    self.counters.write_bytes += num_bytes
                else:
                    self.counters.read_bytes += num_bytes
        return found


class VirtualFs(SecondaryTierManager):
    """Stands for vLLM's fs tier: everything is written, nothing is ever deleted."""

    medium = Medium.STORAGE

    def __init__(
        self, view: memoryview, read_rate: float | None, write_rate: float | None, now: Callable[[], float]
    ) -> None:
        spec: Any = None
        super().__init__(spec, view, "virtual-fs")
        self._stored: set[OffloadKey] = set()
        self._reads, self._writes = Line(read_rate, now), Line(write_rate, now)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        return LookupResult.HIT if key in self._stored else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        fresh = [key for key in job_metadata.keys if key not in self._stored]
        self._writes.send(job_metadata, len(fresh))

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._reads.send(job_metadata, len(job_metadata.keys))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        for job, _ in self._writes.done():
            self._stored.update(job.keys)
            yield JobResult(job.job_id, True)
        for job, _ in self._reads.done():
            yield JobResult(job.job_id, True)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def drain_jobs(self) -> None:
        raise NotImplementedError("nothing resets a cache in virtual time")


class _Region:
    """Memory that nobody reads."""

    def __init__(self, num_chunks: int) -> None:
        self._rows = np.zeros((num_chunks, 1), dtype=np.uint8)

    def create_kv_memoryview(self) -> memoryview:
        return self._rows.data

    def cleanup(self) -> None:
        """Nothing to let go of."""

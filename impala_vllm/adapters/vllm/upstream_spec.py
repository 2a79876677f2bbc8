"""vLLM's own tiers on a CPU engine, for comparison: its managers and policies, our worker, the same caps.

Upstream's worker refuses the CPU platform, and neither it nor the fs tier knows a byte rate. For benchmarks only.
"""

import heapq
import time
from collections.abc import Iterable
from typing import Any

from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker
from vllm.v1.kv_offload.tiering.base import JobResult, TransferJob
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from impala_vllm.adapters.vllm.offload_spec import host_region
from impala_vllm.adapters.vllm.tiers import page_copy
from impala_vllm.adapters.vllm.tiers.paced import PacedWorker
from impala_vllm.adapters.vllm.tiers.page_copy import PageCopyWorker


class UpstreamSpec(TieringOffloadingSpec):
    """`kv_connector_extra_config` is upstream's; `host_bytes_per_s` caps either direction to host."""

    _mover: OffloadingWorker | None = None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._mover is None:
            region = host_region(self)
            self._mover = PageCopyWorker(page_copy.of_region(kv_caches, region, self.blocks_per_chunk), region.cleanup)
            if cap := self.extra_config.get("host_bytes_per_s"):
                self._mover = PacedWorker(self._mover, float(cap))
        return self._mover


class PacedFs(FileSystemTierManager):
    """The fs tier, of which each direction moves `bytes_per_s` at most: jobs are done no sooner than that."""

    def __init__(self, *args: Any, bytes_per_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bytes_per_s = bytes_per_s
        self._free_s = {True: 0.0, False: 0.0}
        self._due_s: dict[int, float] = {}
        self._late: list[tuple[float, int, JobResult]] = []

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._pace(job_metadata)
        super().submit_store(job_metadata)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._pace(job_metadata)
        super().submit_load(job_metadata)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        for result in super().get_finished_jobs():
            heapq.heappush(self._late, (self._due_s.pop(result.job_id), result.job_id, result))
        while self._late and self._late[0][0] <= time.monotonic():
            yield heapq.heappop(self._late)[2]

    def has_pending_work(self) -> bool:
        return bool(self._late) or super().has_pending_work()

    def _pace(self, job: TransferJob) -> None:
        took_s = len(job.keys) * self.block_size_bytes / self._bytes_per_s
        self._free_s[job.is_promotion] = max(self._free_s[job.is_promotion], time.monotonic()) + took_s
        self._due_s[job.job_id] = self._free_s[job.is_promotion]

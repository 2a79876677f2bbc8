"""Keeps the link between HBM and host below a rate, by saying later that a job is done.

Operators cap a link that others need too; benchmarks give a CPU engine the ratios of a GPU's. Jobs of one direction
go one after the other, as on a link; blocks are fenced by the real worker, so a late answer is never an early reuse.
"""

import heapq
import time
from collections.abc import Callable

from vllm.v1.kv_offload.base import GPULoadStoreSpec, LoadStoreSpec, OffloadingWorker, TransferResult


class PacedWorker(OffloadingWorker):
    """Another worker, of which each direction moves `bytes_per_s` at most."""

    def __init__(
        self, worker: OffloadingWorker, bytes_per_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._worker = worker
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._submitted_s: dict[int, tuple[bool, float]] = {}
        self._free_s = {True: 0.0, False: 0.0}
        self._late: list[tuple[float, int, TransferResult]] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        self._submitted_s[job_id] = True, self._clock()
        return self._worker.submit_store(job_id, src_spec, dst_spec)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        self._submitted_s[job_id] = False, self._clock()
        return self._worker.submit_load(job_id, src_spec, dst_spec)

    def get_finished(self) -> list[TransferResult]:
        now = self._clock()
        for result in self._worker.get_finished():
            is_store, submitted_s = self._submitted_s.pop(result.job_id)
            took_s = (result.transfer_size or 0) / self._bytes_per_s
            self._free_s[is_store] = max(self._free_s[is_store], submitted_s) + took_s
            paced = TransferResult(result.job_id, result.success, result.transfer_size, took_s)
            heapq.heappush(self._late, (self._free_s[is_store], result.job_id, paced))
        done: list[TransferResult] = []
        while self._late and self._late[0][0] <= now:
            done.append(heapq.heappop(self._late)[2])
        return done

    def wait(self, job_ids: set[int]) -> None:
        self._worker.wait(job_ids)

    def shutdown(self) -> None:
        self._worker.shutdown()

"""Copies KV between the engine's pool and the host region by rows, where the pool is host memory itself.

vLLM's own worker refuses the CPU platform; this one is for it. A chunk's row in the region is laid out as that worker
does it, so that managers and lower tiers see no difference. Copies run on the worker's thread, as the job is submitted.
"""

import time

import torch
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion


class RowCopyWorker(OffloadingWorker):
    """Moves blocks as soon as asked. Owns the region and lets go of it in `shutdown`."""

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion, blocks_per_chunk: int) -> None:
        self._region = region
        self._blocks_per_chunk = blocks_per_chunk
        self._refs = kv_caches.group_data_refs
        self._pool: list[torch.Tensor] = []  # [num_blocks, page_bytes]
        self._host: list[torch.Tensor] = []  # [num_chunks, blocks_per_chunk, page_bytes]
        for tensor in kv_caches.tensors:
            page_bytes = tensor.page_size_bytes
            self._pool.append(tensor.tensor.view(torch.int8).view(-1, page_bytes))
            row = region.create_next_worker_view(page_bytes * blocks_per_chunk)
            self._host.append(row.unflatten(1, (blocks_per_chunk, page_bytes)))
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        self._copy(job_id, src_spec, dst_spec, is_store=True)
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        self._copy(job_id, dst_spec, src_spec, is_store=False)
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is under way once `submit_*` has returned."""

    def shutdown(self) -> None:
        self._pool.clear()
        self._host.clear()
        self._region.cleanup()

    def _copy(self, job_id: int, gpu: GPULoadStoreSpec, host: LoadStoreSpec, is_store: bool) -> None:
        assert isinstance(host, BlockIDsLoadStoreSpec)
        started_s = time.perf_counter()
        num_bytes = 0
        first_block = first_chunk = 0
        blocks = torch.from_numpy(gpu.block_ids).long()
        chunks = torch.from_numpy(host.block_ids).long()
        for refs, size, index in zip(self._refs, gpu.group_sizes, gpu.block_indices, strict=True):
            if not size:
                continue
            # A group may begin and end in the middle of a chunk.
            skipped = index % self._blocks_per_chunk
            place = torch.arange(skipped, skipped + size)
            block = blocks[first_block : first_block + size]
            chunk = chunks[first_chunk + place // self._blocks_per_chunk]
            within = place % self._blocks_per_chunk
            for ref in refs:
                pool, row = self._pool[ref.tensor_idx], self._host[ref.tensor_idx]
                if is_store:
                    row[chunk, within] = pool[block]
                else:
                    pool[block] = row[chunk, within]
                num_bytes += size * ref.page_size_bytes
            first_block += size
            first_chunk += -(-(skipped + size) // self._blocks_per_chunk)
        seconds = time.perf_counter() - started_s
        self._finished.append(TransferResult(job_id, True, num_bytes, seconds))

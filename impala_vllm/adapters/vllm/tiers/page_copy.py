"""The offloading worker: moves KV between the engine's pool and the host region by our own copies.

Translates vLLM's transfers into batches of pages; a `Courier` carries them, on a GPU by kernels and DMA beside the
model, on the CPU platform at once. A chunk's row in the region is laid out as vLLM's own worker does it, so that
managers and lower tiers see no difference; demoted to FP8 it is laid out as `ops` says.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from impala_vllm import ops
from impala_vllm.ops import Batch, Courier, PageTable, Pool, Ticket, Way


class LayoutError(ValueError):
    """KV that our copies cannot move, in one line."""


@dataclass(frozen=True, slots=True)
class Room:
    """Both sides of the worker's copies."""

    pools: list[Pool]
    """By KV cache group; groups may overlay each other's bytes."""
    blocks_per_chunk: int


def of_tensors(
    pool: Sequence[Tensor], host: Sequence[Tensor], refs: Sequence[Sequence[CanonicalKVCacheRef]], blocks_per_chunk: int
) -> Room:
    """Of KV tensors `[num_blocks, page_bytes]` and views of the region `[num_chunks, blocks_per_chunk * page_bytes]`.

    Copies what layers use of a page, without its padding. Raises LayoutError for what has no page table.
    """
    pools: list[Pool] = []
    for group in refs:
        used: dict[int, int] = {}
        for ref in group:  # layers that share a tensor move its bytes once
            used[ref.tensor_idx] = max(ref.page_size_bytes, used.get(ref.tensor_idx, 0))
        pages = [pool[i].view(torch.uint8)[:, :num_bytes] for i, num_bytes in used.items()]
        rows = [host[i].view(torch.uint8).unflatten(1, (blocks_per_chunk, -1))[:, :, :n] for i, n in used.items()]
        pools.append(_pool(pages, rows, is_demoted=False))
    return Room(pools, blocks_per_chunk)


def of_region(kv_caches: CanonicalKVCaches, region: SharedOffloadRegion, blocks_per_chunk: int) -> Room:
    """As `of_tensors`, of a region that nobody has taken views of yet."""
    pool = [t.tensor.view(torch.int8).view(-1, t.page_size_bytes) for t in kv_caches.tensors]
    host = [region.create_next_worker_view(t.page_size_bytes * blocks_per_chunk) for t in kv_caches.tensors]
    return of_tensors(pool, host, kv_caches.group_data_refs, blocks_per_chunk)


def of_runs(kv_caches: CanonicalKVCaches, region: SharedOffloadRegion, blocks_per_chunk: int, run_bytes: int) -> Room:
    """FP8 in the region: a chunk is `blocks_per_chunk` runs of `run_bytes`.

    KV is bfloat16, which nothing here tells. Raises LayoutError for several KV cache groups.
    """
    if len(kv_caches.group_data_refs) != 1:
        raise LayoutError("the model has several KV cache groups")
    used = {ref.tensor_idx: ref.page_size_bytes for ref in kv_caches.group_data_refs[0]}
    tensors = [(kv_caches.tensors[i], num_bytes) for i, num_bytes in used.items()]
    pages = [t.tensor.view(torch.uint8).view(-1, t.page_size_bytes)[:, :num_bytes] for t, num_bytes in tensors]
    rows = region.create_next_worker_view(run_bytes * blocks_per_chunk).view(torch.uint8)
    return Room([_pool(pages, [rows.unflatten(1, (blocks_per_chunk, run_bytes))], is_demoted=True)], blocks_per_chunk)


class PageCopyWorker(OffloadingWorker):
    """Launches what it is asked, tells later what is done. `on_shutdown` frees the memory of `room`, which is the
    worker's until then."""

    def __init__(self, room: Room, on_shutdown: Callable[[], None], courier: Courier | None = None) -> None:
        self._room: Room | None = room
        self._on_shutdown = on_shutdown
        self._courier = courier or Courier(room.pools[0].hbm.device)
        self._stores: deque[tuple[int, Ticket]] = deque()
        self._loads: deque[tuple[int, Ticket]] = deque()

    @property
    def is_demoting(self) -> bool:
        """Whether what it stores is FP8."""
        return self._room is not None and self._room.pools[0].is_demoted

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        self._stores.append((job_id, self._courier.store(self._batches(src_spec, dst_spec))))
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        self._loads.append((job_id, self._courier.load(self._batches(dst_spec, src_spec))))
        return True

    def get_finished(self) -> list[TransferResult]:
        """Each direction ends in the order in which it was asked."""
        results: list[TransferResult] = []
        for jobs in (self._stores, self._loads):
            while jobs and jobs[0][1].end.is_done():
                job_id, ticket = jobs.popleft()
                results.append(TransferResult(job_id, True, ticket.num_bytes, ticket.end.seconds()))
        return results

    def wait(self, job_ids: set[int]) -> None:
        for job_id, ticket in (*self._stores, *self._loads):
            if job_id in job_ids:
                ticket.end.wait()

    def shutdown(self) -> None:
        """Idempotent. Waits for what is under way: nobody may write to memory that is given back."""
        if self._room is None:
            return
        try:
            for _, ticket in (*self._stores, *self._loads):
                ticket.end.wait()
        finally:
            self._stores.clear()
            self._loads.clear()
            self._room = None
            self._on_shutdown()

    def _batches(self, gpu: GPULoadStoreSpec, host: LoadStoreSpec) -> list[Batch]:
        assert isinstance(host, BlockIDsLoadStoreSpec)
        assert self._room is not None
        per_chunk = self._room.blocks_per_chunk
        batches: list[Batch] = []
        first_block = first_chunk = 0
        for pool, size, index in zip(self._room.pools, gpu.group_sizes, gpu.block_indices, strict=True):
            if not size:
                continue
            # A group may begin and end in the middle of a chunk.
            skipped = index % per_chunk
            place = np.arange(skipped, skipped + size)
            blocks = gpu.block_ids[first_block : first_block + size].astype(np.int64)
            chunks = host.block_ids[first_chunk + place // per_chunk].astype(np.int64)
            host_ids = chunks * per_chunk + place % per_chunk
            batches.append(Batch(pool, torch.from_numpy(blocks), torch.from_numpy(host_ids)))
            first_block += size
            first_chunk += -(-(skipped + size) // per_chunk)
        return batches


def prove(room: Room, courier: Courier) -> None:
    """Compile the kernels and send a block of each group to the host and back, by every way there is and on the lanes
    that a model's blocks will take, before it relies on them.

    Blocks 0 and 1 stay as they were; the first chunks do not, so nothing may lie there yet. Waits for the device.
    Raises LayoutError where other bytes came back than were sent, and whatever a compiler or driver raises.
    """
    for number, pool in enumerate(room.pools):
        if pool.hbm.layers[0].shape[0] < 2:
            continue
        rows, per_row = pool.host.layers[0].shape[:2]
        for place, way in enumerate(ops.ways(pool)):
            if not _comes_back(pool, courier, way, min(place, rows * per_row - 1)):
                raise LayoutError(f"a block of KV cache group {number} came back with other bytes by {way.value}")


def _comes_back(pool: Pool, courier: Courier, way: Way, place: int) -> bool:
    """Whether block 0 is the same in block 1 after a time in page `place` of the host."""
    hbm, ids = pool.hbm, torch.arange(2)
    before = [hbm.read(layer, ids) for layer in range(len(hbm.layers))]
    sent = [_pattern(pages[:1], layer) for layer, pages in enumerate(before)]
    for layer, pages in enumerate(sent):
        hbm.write(layer, ids[:1], pages)
    at = torch.tensor([place])
    courier.store([Batch(pool, ids[:1], at)], way).end.wait()
    courier.load([Batch(pool, ids[1:], at)], way).end.wait()
    got = [hbm.read(layer, ids[1:]) for layer in range(len(hbm.layers))]
    for layer, pages in enumerate(before):
        hbm.write(layer, ids, pages)
    return all(torch.equal(a, b) for a, b in zip(sent, got, strict=True))


def _pattern(like: Tensor, seed: int) -> Tensor:
    """Bytes that every rank makes alike, as ranks may share a row; as bfloat16 they are small whole numbers, which FP8
    keeps."""
    numbers = torch.randint(0, 9, (like.numel() // 2,), generator=torch.Generator().manual_seed(seed))
    return numbers.to(torch.bfloat16).view(torch.uint8).view(like.shape).to(like.device)


def _pool(pages: Sequence[Tensor], rows: Sequence[Tensor], *, is_demoted: bool) -> Pool:
    try:
        hbm = PageTable.of(pages)
        return Pool(hbm, PageTable.of(rows, hbm.device), is_demoted)
    except (ValueError, RuntimeError) as error:
        raise LayoutError(str(error).splitlines()[0]) from error

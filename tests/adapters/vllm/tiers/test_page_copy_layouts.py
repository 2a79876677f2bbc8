"""KV as vLLM lays it out, through vLLM's own connector worker: our copies read and write where vLLM's would."""

import ctypes
import os
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec, OffloadingWorker
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.gpu_worker import compute_sub_block_ptrs
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.worker.utils import allocate_kv_cache

from impala_vllm.adapters.vllm.tiers import page_copy
from impala_vllm.adapters.vllm.tiers.page_copy import PageCopyWorker

NUM_BLOCKS, NUM_CHUNKS, PER_CHUNK = 12, 8, 2
FULL = FullAttentionSpec(block_size=4, num_kv_heads=2, head_size=8, dtype=torch.bfloat16)
WINDOW = SlidingWindowSpec(block_size=4, num_kv_heads=2, head_size=8, dtype=torch.bfloat16, sliding_window=8)
MLA = MLAAttentionSpec(block_size=4, num_kv_heads=1, head_size=72, dtype=torch.bfloat16)
MODELS: dict[str, list[KVCacheSpec]] = {"dense": [FULL], "MLA": [MLA], "hybrid": [FULL, WINDOW]}
LAYERS = 3
"""Of each group."""


@dataclass
class Model:
    """A model's KV with a canary's worth of random bytes in it, and the worker over it."""

    kv: torch.Tensor
    """The allocation that all layers lie in."""
    caches: CanonicalKVCaches
    host: list[torch.Tensor]
    """A view of the region for each tensor, as vLLM's worker takes them."""
    region: SharedOffloadRegion
    worker: PageCopyWorker


@pytest.fixture(params=[(m, k) for m in MODELS for k in ("LBNHC", "BLNHC")], ids=lambda p: f"{p[0]}-{p[1]}")
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    name, layout = request.param
    made = _model(MODELS[name], KVCacheLayout[layout])
    yield made
    path = made.region.mmap_path
    made.host.clear()
    made.worker.shutdown()
    assert not os.path.exists(path)


def _model(specs: list[KVCacheSpec], layout: KVCacheLayout) -> Model:
    groups = [KVCacheGroupSpec([f"{g}.{i}" for i in range(LAYERS)], spec) for g, spec in enumerate(specs)]
    # What the two of vLLM's functions read of a configuration that takes a model to make.
    config: Any = SimpleNamespace(
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: layout,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
        parallel_config=SimpleNamespace(world_size=2, tensor_parallel_size=1, prefill_context_parallel_size=1),
    )
    per_block = LAYERS * max(spec.page_size_bytes for spec in specs)
    kv_config = get_kv_cache_config_from_groups(config, groups, NUM_BLOCKS * per_block)
    assert kv_config.num_blocks == NUM_BLOCKS
    views = allocate_kv_cache(kv_config, torch.device("cpu"), layout)
    kv = torch.tensor([], dtype=torch.uint8).set_(next(iter(views.values())).untyped_storage())
    kv.copy_(torch.randint(0, 256, kv.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)))
    found: list[CanonicalKVCaches] = []

    def get_worker(caches: CanonicalKVCaches) -> OffloadingWorker | None:
        found.append(caches)

    spec: Any = SimpleNamespace(replicated_layout=False, get_worker=get_worker)
    OffloadingConnectorWorker(spec, config, kv_config).register_kv_caches(views)
    caches = found[0]
    cell = sum(t.page_size_bytes for t in caches.tensors) * PER_CHUNK
    region = SharedOffloadRegion(f"test-{uuid.uuid4()}", NUM_CHUNKS, 0, -(-cell // 4096) * 4096, cell)
    room = page_copy.of_region(caches, region, PER_CHUNK)
    assert region._views is not None
    return Model(kv, caches, list(region._views), region, PageCopyWorker(room, region.cleanup))


def test_bytes_lie_where_vllms_worker_puts_them_and_come_back_from_there(model: Model) -> None:
    rng = random.Random(0)
    groups = model.caches.group_data_refs
    sizes, indices = [5] * len(groups), [rng.randrange(4) for _ in groups]
    needed = [-(-(i % PER_CHUNK + n) // PER_CHUNK) for i, n in zip(indices, sizes, strict=True)]
    blocks, chunks = rng.sample(range(NUM_BLOCKS), sum(sizes)), rng.sample(range(NUM_CHUNKS), sum(needed))
    # Groups overlay each other's bytes, a block is one group's at a time.
    move = GPULoadStoreSpec(blocks, sizes, indices), CPULoadStoreSpec(chunks)
    rows = model.region.base_tensor.view(torch.uint8).view(-1)
    rows.copy_(torch.randint(0, 256, rows.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2)))
    before, kv = rows.clone(), model.kv.clone()
    is_ours = torch.zeros(len(rows), dtype=torch.bool)

    model.worker.submit_store(1, *move)

    pairs = list(_pairs(model, blocks, chunks, sizes, indices))
    assert len(pairs) == sum(n * len(refs) for n, refs in zip(sizes, groups, strict=True))
    for there, here, num_bytes in pairs:
        assert ctypes.string_at(here, num_bytes) == ctypes.string_at(there, num_bytes)
        is_ours[here - rows.data_ptr() :][:num_bytes] = True
    assert torch.equal(rows[~is_ours], before[~is_ours])
    assert torch.equal(model.kv, kv)

    for there, _, num_bytes in pairs:
        ctypes.memset(there, 0, num_bytes)
    model.worker.submit_load(2, move[1], move[0])
    assert torch.equal(model.kv, kv)
    assert [r.transfer_size for r in model.worker.get_finished()] == [sum(n for _, _, n in pairs)] * 2


def _pairs(
    model: Model, blocks: list[int], chunks: list[int], sizes: list[int], indices: list[int]
) -> Iterator[tuple[int, int, int]]:
    """Address in KV, address in the region and length of all that a transfer moves, by vLLM's own arithmetic."""
    for refs, size, index in zip(model.caches.group_data_refs, sizes, indices, strict=True):
        skip = index % PER_CHUNK
        needed = -(-(skip + size) // PER_CHUNK)
        there, here = np.empty(size, dtype=np.uint64), np.empty(size, dtype=np.uint64)
        for ref in refs:
            cache = model.caches.tensors[ref.tensor_idx]
            pool = cache.tensor.view(torch.int8).view(-1, cache.page_size_bytes)
            compute_sub_block_ptrs(np.array(blocks[:size]), 1, there, pool)
            compute_sub_block_ptrs(np.array(chunks[:needed]), PER_CHUNK, here, model.host[ref.tensor_idx], skip)
            for a, b in zip(there.tolist(), here.tolist(), strict=True):
                yield int(a), int(b), ref.page_size_bytes
        blocks, chunks = blocks[size:], chunks[needed:]

"""A worker with a pool and a region of its own, and transfers told block by block."""

import os
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor, GPULoadStoreSpec
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from impala_vllm.adapters.vllm.tiers import page_copy
from impala_vllm.adapters.vllm.tiers.page_copy import PageCopyWorker
from impala_vllm.ops import Courier

NUM_BLOCKS, NUM_CHUNKS = 40, 30
PAGES = (48, 32, 64)
"""Bytes of a block in each tensor."""
GROUPS = ((0, 1), (2,), (1, 2))
"""Tensors that each KV cache group has layers in; groups may overlay each other."""
LENGTHS = (6, 9, 5)
"""Blocks of each group in a transfer."""


@dataclass
class Side:
    """A worker with a pool of its own, on a region that may be shared."""

    pool: list[torch.Tensor]
    """As int8: [num_blocks, page_bytes]."""
    region: SharedOffloadRegion
    worker: PageCopyWorker

    def rows(self) -> torch.Tensor:
        return self.region.base_tensor.view(self.region.num_chunks, -1)


class Maker:
    """Makes regions under a name of its own, and takes them away."""

    def __init__(self) -> None:
        self.engine_id = f"test-{uuid.uuid4()}"
        self._sides: list[Side] = []

    def side(self, per_chunk: int, rank: int = 0, num_ranks: int = 1, courier: Courier | None = None) -> Side:
        cell = sum(PAGES) * per_chunk
        row = -(-cell * num_ranks // os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PAGE_SIZE")
        region = SharedOffloadRegion(self.engine_id, NUM_CHUNKS, rank, row, cell)
        generator = torch.Generator().manual_seed(rank)
        dtypes = (torch.bfloat16, torch.int8, torch.float32)
        pool: list[torch.Tensor] = []
        tensors: list[CanonicalKVCacheTensor] = []
        for page, dtype in zip(PAGES, dtypes, strict=True):
            whole = torch.randint(-128, 128, (NUM_BLOCKS, page), dtype=torch.int8, generator=generator)
            pool.append(whole)
            tensors.append(CanonicalKVCacheTensor(whole.view(dtype), page))
        refs = [[CanonicalKVCacheRef(tensor, PAGES[tensor]) for tensor in group] for group in GROUPS]
        room = page_copy.of_region(CanonicalKVCaches(tensors, refs), region, per_chunk)
        side = Side(pool, region, PageCopyWorker(room, region.cleanup, courier))
        self._sides.append(side)
        return side

    def close(self) -> None:
        for side in self._sides:
            side.worker.shutdown()


@dataclass(frozen=True)
class Plan:
    """A transfer: each group's blocks, where in its sequence they begin, and the chunks they lie in."""

    blocks: list[list[int]]
    indices: list[int]
    chunks: list[list[int]]

    def gpu(self) -> GPULoadStoreSpec:
        return GPULoadStoreSpec([*chain(*self.blocks)], [len(b) for b in self.blocks], self.indices)

    def host(self) -> CPULoadStoreSpec:
        return CPULoadStoreSpec([*chain(*self.chunks)])

    def places(self, per_chunk: int) -> Iterator[tuple[int, int, int, int]]:
        """Group, block, chunk and place in the chunk of everything that moves, told one by one."""
        for group, blocks in enumerate(self.blocks):
            for number, block in enumerate(blocks):
                place = self.indices[group] % per_chunk + number
                yield group, block, self.chunks[group][place // per_chunk], place % per_chunk


def plan(rng: random.Random, per_chunk: int, lengths: tuple[int, ...] = LENGTHS) -> Plan:
    blocks, chunks = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS), rng.sample(range(NUM_CHUNKS), NUM_CHUNKS)
    indices = [rng.randrange(10) if length else 0 for length in lengths]
    needed = [-(-(i % per_chunk + n) // per_chunk) if n else 0 for i, n in zip(indices, lengths, strict=True)]
    return Plan(
        [[blocks.pop() for _ in range(n)] for n in lengths], indices, [[chunks.pop() for _ in range(n)] for n in needed]
    )


def place_of(tensor: int, within: int, per_chunk: int) -> slice:
    """Where in a chunk's row a block's page of a tensor lies: tensor after tensor, block after block."""
    start = sum(PAGES[:tensor]) * per_chunk + within * PAGES[tensor]
    return slice(start, start + PAGES[tensor])

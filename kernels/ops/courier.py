"""Carries pages between HBM and pinned host memory on streams of its own, so that a model goes on meanwhile.

Decides between the DMA engines and our kernels, and in which order the GPU does things. What is kept where is the
caller's business.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from impala_vllm.ops import dispatch, lane, naive, tuning
from impala_vllm.ops.id_buffers import IdBuffers
from impala_vllm.ops.lane import End, Lane
from impala_vllm.ops.pages import PageTable


@dataclass(frozen=True, slots=True)
class Pool:
    """Pages in HBM and the room for them in host memory, whose pages are pinned; both tables are of one device."""

    hbm: PageTable
    host: PageTable
    """Layers as in HBM; where pages are demoted, one layer of FP8 runs."""
    is_demoted: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for tables that do not belong together."""
        if self.hbm.device != self.host.device:
            raise ValueError(f"both tables have the same device, not {self.hbm.device} and {self.host.device}")
        if self.is_demoted and self.host.run_bytes < naive.demoted_bytes(self.hbm):
            raise ValueError(f"{self.host.run_bytes} bytes do not hold a run of {naive.demoted_bytes(self.hbm)}")
        if not self.is_demoted and self.hbm.page_bytes != self.host.page_bytes:
            raise ValueError(f"both tables have the same page sizes, not {self.hbm.page_bytes}, {self.host.page_bytes}")

    @property
    def moved_bytes(self) -> int:
        """Of one page of each layer, over the link."""
        return naive.demoted_bytes(self.hbm) if self.is_demoted else self.hbm.run_bytes


class Way(Enum):
    """How a batch goes."""

    DMA = "dma"
    KERNEL = "kernel"
    """Torch's own copies where there is no Triton."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Pages of a pool and their places in host memory, pair by pair; int64 ids in host memory, all different."""

    pool: Pool
    hbm_ids: Tensor
    host_ids: Tensor


@dataclass(frozen=True, slots=True)
class Ticket:
    """Batches under way."""

    num_bytes: int
    end: End


class Courier:
    """Between pools in HBM and in host memory. One thread's.

    Order, all of it kept by the GPU:
    - A batch begins after everything launched on the current stream before it: a store finds its pages as the model
      left them, a load finds them read, zeroed and given up by whoever had them.
    - Stores keep their order, and so do loads. Each kind has a lane, so the two directions share the link.
    - The caller keeps pages of a store from being written, and pages of a load from being read, until the ticket's end,
      or launches what does so on a stream that its `hold_back` was told of.
    - A load may take host pages once the store that filled them is done, and a store may fill host pages once loads
      of them are.
    """

    def __init__(self, device: torch.device, lanes: tuple[Lane, Lane] | None = None) -> None:
        """`lanes`: of stores and of loads; those of the device by default."""
        self._stores, self._loads = lanes or (lane.of(device), lane.of(device))
        self._store_ids, self._load_ids = IdBuffers(device), IdBuffers(device)

    def store(self, batches: Sequence[Batch], way: Way | None = None) -> Ticket:
        """Pages of HBM to pages of the host, by the best way unless told. Returns once it is launched; ids are the
        caller's again then. Told a way that is none of `ways`, it raises ValueError."""
        return self._carry(batches, self._stores, self._store_ids, way, is_store=True)

    def load(self, batches: Sequence[Batch], way: Way | None = None) -> Ticket:
        """Pages of the host to pages of HBM, likewise."""
        return self._carry(batches, self._loads, self._load_ids, way, is_store=False)

    def _carry(self, batches: Sequence[Batch], on: Lane, ids: IdBuffers, way: Way | None, *, is_store: bool) -> Ticket:
        num_bytes = sum(len(batch.hbm_ids) * batch.pool.moved_bytes for batch in batches)
        planned = [(batch, _way(batch, way, is_store=is_store)) for batch in batches if len(batch.hbm_ids)]

        def launch() -> None:
            for batch, chosen in planned:
                _launch(batch, chosen, ids, is_store=is_store)

        return Ticket(num_bytes, on.run(launch))


def ways(pool: Pool) -> tuple[Way, ...]:
    """By which batches of it can go here."""
    device = pool.hbm.device
    if pool.is_demoted or _batched_dma(device) is None:
        return (Way.KERNEL,)
    return (Way.DMA, Way.KERNEL) if dispatch.has_triton(device) else (Way.DMA,)


def takes_dma(page_bytes: tuple[int, ...], num_pages: int, *, is_store: bool) -> bool:
    """Whether a batch goes by the DMA engines where both ways are there: to the host, as they keep the multiprocessors
    free and are as fast, and to the device where pages are large or few, as a descriptor then costs less than a launch;
    but not where so many descriptors would keep the engine's thread from its model."""
    num_descriptors = num_pages * len(page_bytes)
    if num_descriptors > tuning.DMA_UP_TO_DESCRIPTORS:
        return False
    is_few = num_descriptors < tuning.KERNEL_FROM_PAGES
    return is_store or is_few or max(page_bytes) >= tuning.DMA_FROM_BYTES


def _way(batch: Batch, asked: Way | None, *, is_store: bool) -> Way:
    possible = ways(batch.pool)
    if asked is not None:
        if asked not in possible:
            raise ValueError(f"no {asked.value} for these pages here")
        return asked
    if len(possible) == 1:
        return possible[0]
    has_won = takes_dma(batch.pool.hbm.page_bytes, len(batch.hbm_ids), is_store=is_store)
    return Way.DMA if has_won else Way.KERNEL


def _launch(batch: Batch, way: Way, buffers: IdBuffers, *, is_store: bool) -> None:
    """On the current stream, in slices of bounded size."""
    pool = batch.pool
    source, target = (pool.hbm, pool.host) if is_store else (pool.host, pool.hbm)
    ids = (batch.hbm_ids, batch.host_ids) if is_store else (batch.host_ids, batch.hbm_ids)
    if way is Way.DMA:
        copy = _batched_dma(source.device)
        assert copy is not None
        for source_ids, target_ids in _slices(ids, max(1, tuning.DMA_DESCRIPTORS // len(source.layers))):
            # Nobody writes host memory on a stream, so the engines may read ahead of it.
            copy(*_ranges(source, source_ids, target, target_ids), not is_store)
        return
    move = _kernel(pool, is_store=is_store)
    for source_ids, target_ids in _slices(ids, buffers.most_pairs):
        at, to = buffers.send(source_ids, target_ids)
        move(source, at, target, to)


def _kernel(pool: Pool, *, is_store: bool) -> Callable[[PageTable, Tensor, PageTable, Tensor], None]:
    if not pool.is_demoted:
        return dispatch.swap_pages
    return dispatch.demote_pages if is_store else dispatch.promote_pages


def _slices(ids: tuple[Tensor, Tensor], most: int) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(*(each.split(most) for each in ids), strict=True)


def _batched_dma(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, bool], None] | None:
    """cudaMemcpyBatchAsync as vLLM's native library has it, where one is loaded; torch has no batch."""
    return getattr(torch.ops._C_cache_ops, "swap_blocks_batch", None) if device.type == "cuda" else None


def _ranges(
    sources: PageTable, source_ids: Tensor, targets: PageTable, target_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Addresses and sizes of all pages, layer by layer, in host memory."""
    sizes = torch.tensor(sources.page_bytes).repeat_interleave(len(source_ids))
    return sources.addresses_of(source_ids).flatten(), targets.addresses_of(target_ids).flatten(), sizes

"""Carries pages between HBM and pinned host memory on streams of its own, so that a model goes on meanwhile.

Decides between the DMA engines and our kernels, and in which order the GPU does things. What is kept where is the
caller's business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from impala_vllm.ops import dispatch, lane, naive, tuning
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

    def store(self, batches: Sequence[Batch]) -> Ticket:
        """Pages of HBM to pages of the host. Returns once it is launched; ids are the caller's again then."""
        return self._carry(batches, self._stores, is_store=True)

    def load(self, batches: Sequence[Batch]) -> Ticket:
        """Pages of the host to pages of HBM, likewise."""
        return self._carry(batches, self._loads, is_store=False)

    def _carry(self, batches: Sequence[Batch], on: Lane, *, is_store: bool) -> Ticket:
        num_bytes = sum(len(batch.hbm_ids) * batch.pool.moved_bytes for batch in batches)

        def launch() -> None:
            for batch in batches:
                _launch(batch, is_store=is_store)

        return Ticket(num_bytes, on.run(launch))


def takes_dma(page_bytes: tuple[int, ...], num_pages: int, *, is_store: bool, has_dma: bool) -> bool:
    """Whether a batch goes by the DMA engines: to the host always, as they keep the multiprocessors free and are as
    fast; to the device where pages are large or few, where a descriptor a page costs less than a launch."""
    if not has_dma or num_pages == 0:
        return False
    is_few = num_pages * len(page_bytes) < tuning.KERNEL_FROM_PAGES
    return is_store or is_few or max(page_bytes) >= tuning.DMA_FROM_BYTES


def _launch(batch: Batch, *, is_store: bool) -> None:
    """On the current stream."""
    pool, num_pages = batch.pool, len(batch.hbm_ids)
    if not num_pages:
        return
    source, target = (pool.hbm, pool.host) if is_store else (pool.host, pool.hbm)
    source_ids, target_ids = (batch.hbm_ids, batch.host_ids) if is_store else (batch.host_ids, batch.hbm_ids)
    copy = _batched_dma() if source.device.type == "cuda" and not pool.is_demoted else None
    if copy is not None and (
        not dispatch.has_triton(source.device)
        or takes_dma(source.page_bytes, num_pages, is_store=is_store, has_dma=True)
    ):
        # Nobody writes host memory on a stream, so the engines may read ahead of it.
        copy(*_ranges(source, source_ids, target, target_ids), not is_store)
        return
    source_ids, target_ids = _sent(source_ids, target_ids, source.device)
    if not pool.is_demoted:
        dispatch.swap_pages(source, source_ids, target, target_ids)
    elif is_store:
        dispatch.demote_pages(source, source_ids, target, target_ids)
    else:
        dispatch.promote_pages(source, source_ids, target, target_ids)


def _sent(source_ids: Tensor, target_ids: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both where a kernel reads them, in one copy that nobody waits for."""
    if device.type != "cuda":
        return source_ids, target_ids
    pair = torch.stack([source_ids, target_ids]).pin_memory().to(device, non_blocking=True)
    return pair[0], pair[1]


def _batched_dma() -> Callable[[Tensor, Tensor, Tensor, bool], None] | None:
    """cudaMemcpyBatchAsync as vLLM's native library has it, where one is loaded; torch has no batch."""
    return getattr(torch.ops._C_cache_ops, "swap_blocks_batch", None)


def _ranges(
    sources: PageTable, source_ids: Tensor, targets: PageTable, target_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Addresses and sizes of all pages, layer by layer, in host memory."""
    sizes = torch.tensor(sources.page_bytes).repeat_interleave(len(source_ids))
    return sources.addresses_of(source_ids).flatten(), targets.addresses_of(target_ids).flatten(), sizes

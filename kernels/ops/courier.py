"""Carries pages between HBM and pinned host memory on streams of its own, so that a model goes on meanwhile.

Decides between the DMA engines and our kernel, and in which order the GPU does things. What is kept where is the
caller's business.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from impala_vllm.ops import dispatch, tuning
from impala_vllm.ops.pages import PageTable


@dataclass(frozen=True, slots=True)
class Ticket:
    """A batch under way. Nobody waits for it but who asks to."""

    num_bytes: int
    _end: torch.cuda.Event | None
    """None: it was done before the ticket was made."""

    def is_done(self) -> bool:
        """Whether every byte is there. O(1), asks the driver."""
        return self._end is None or self._end.query()

    def hold_back(self, stream: torch.cuda.Stream) -> None:
        """Work launched on `stream` from here on begins after the batch; the host does not wait."""
        if self._end is not None:
            stream.wait_event(self._end)

    def wait(self) -> None:
        """Make the host wait for the end of it."""
        if self._end is not None:
            self._end.synchronize()


class Courier:
    """Between one pool in HBM and one in host memory, layer by layer of the same page sizes. One thread's.

    Order, all of it kept by the GPU:
    - A batch begins after everything launched on the current stream before it: a store finds its pages as the model
      left them, a load finds them read, zeroed and given up by whoever had them.
    - Stores keep their order, and so do loads. Each kind has a stream, so the two directions share the link.
    - The caller keeps pages of a store from being written, and pages of a load from being read, until `is_done`, or
      launches what does so on a stream that `hold_back` was told of.
    - A load may take host pages once the store that filled them `is_done`, and a store may fill host pages once loads
      of them are.
    """

    def __init__(self, hbm: PageTable, host: PageTable) -> None:
        """Both tables are of the GPU, the host's memory pinned (of the CPU: copies are done at once)."""
        if hbm.page_bytes != host.page_bytes or hbm.device != host.device:
            raise ValueError("both tables have the same page sizes and the same device")
        self._hbm = hbm
        self._host = host
        is_cuda = hbm.device.type == "cuda"
        self._store_stream = torch.cuda.Stream(hbm.device) if is_cuda else None
        self._load_stream = torch.cuda.Stream(hbm.device) if is_cuda else None

    def store(self, hbm_ids: Tensor, host_ids: Tensor) -> Ticket:
        """Pages of HBM to pages of the host; ids are int64 in host memory. Returns once it is launched."""
        return self._carry(self._hbm, hbm_ids, self._host, host_ids, self._store_stream, is_store=True)

    def load(self, host_ids: Tensor, hbm_ids: Tensor) -> Ticket:
        """Pages of the host to pages of HBM, likewise."""
        return self._carry(self._host, host_ids, self._hbm, hbm_ids, self._load_stream, is_store=False)

    def _carry(
        self,
        sources: PageTable,
        source_ids: Tensor,
        targets: PageTable,
        target_ids: Tensor,
        stream: torch.cuda.Stream | None,
        *,
        is_store: bool,
    ) -> Ticket:
        num_bytes = len(source_ids) * sources.run_bytes
        if stream is None:
            dispatch.swap_pages(sources, source_ids, targets, target_ids)
            return Ticket(num_bytes, None)
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            copy = _batched_dma()
            has_kernel = dispatch.has_triton(sources.device)
            if takes_dma(sources.page_bytes, len(source_ids), is_store=is_store, has_dma=copy is not None) or (
                copy is not None and not has_kernel
            ):
                assert copy is not None
                # Nobody writes host memory on a stream, so the engines may read ahead of it.
                copy(*_ranges(sources, source_ids, targets, target_ids), not is_store)
            else:
                ids = [i.pin_memory().to(sources.device, non_blocking=True) for i in (source_ids, target_ids)]
                dispatch.swap_pages(sources, ids[0], targets, ids[1])
            end = torch.cuda.Event()
            end.record(stream)
        return Ticket(num_bytes, end)


def takes_dma(page_bytes: tuple[int, ...], num_pages: int, *, is_store: bool, has_dma: bool) -> bool:
    """Whether a batch goes by the DMA engines: to the host always, as they keep the multiprocessors free and are as
    fast; to the device where pages are large or few, where a descriptor a page costs less than a launch."""
    if not has_dma or num_pages == 0:
        return False
    is_few = num_pages * len(page_bytes) < tuning.KERNEL_FROM_PAGES
    return is_store or is_few or max(page_bytes) >= tuning.DMA_FROM_BYTES


def _batched_dma() -> Callable[[Tensor, Tensor, Tensor, bool], None] | None:
    """cudaMemcpyBatchAsync as vLLM's native library has it, where one is loaded; torch has no batch."""
    return getattr(torch.ops._C_cache_ops, "swap_blocks_batch", None)


def _ranges(
    sources: PageTable, source_ids: Tensor, targets: PageTable, target_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Addresses and sizes of all pages, layer by layer, in host memory."""
    ends = [
        torch.cat([layer.data_ptr() + ids * layer.stride(0) for layer in table.layers])
        for table, ids in ((sources, source_ids), (targets, target_ids))
    ]
    sizes = torch.tensor(sources.page_bytes).repeat_interleave(len(source_ids))
    return ends[0], ends[1], sizes

"""The ways to move a batch of pages over the link that a GPU run compares: ours, vLLM's, torch's."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu import device
from benchmarks.gpu.slabs import ids
from impala_vllm import ops
from impala_vllm.ops import Batch as Carried
from impala_vllm.ops import Courier, PageTable, Pool

Move = Callable[[], object]
NUM_LOOKED_AT = 16


@dataclass(frozen=True, slots=True)
class Pages:
    """Memory on either side of the link, as pages of any size."""

    host: Tensor
    there: Tensor
    place: torch.device

    @classmethod
    def of(cls, num_bytes: int, place: torch.device) -> "Pages":
        """Full of noise."""
        host, there = device.host_bytes(num_bytes, place), device.device_bytes(num_bytes, place)
        host.copy_(there.random_(0, 256))
        return cls(host, there, place)

    def batch(self, direction: str, page_bytes: int, count: int) -> "Batch":
        """`count` random pages to random places; H2D or D2H."""
        num_pages = self.host.numel() // page_bytes
        sides = [t[: num_pages * page_bytes].view(num_pages, page_bytes) for t in (self.host, self.there)]
        source, target = sides if direction == "H2D" else reversed(sides)
        return Batch(source, target, ids(count, num_pages, 1), ids(count, num_pages, 2), direction, self.place)


@dataclass(frozen=True, slots=True)
class Batch:
    """Which pages go where. Its movers may be called again and again."""

    source: Tensor
    """`[num_pages, page_bytes]`."""
    target: Tensor
    source_ids: Tensor
    target_ids: Tensor
    direction: str
    place: torch.device

    @property
    def num_bytes(self) -> int:
        return len(self.source_ids) * self.source.shape[1]

    def impala(self) -> Move:
        """Our kernel over page tables."""
        source, target = PageTable.of([self.source], self.place), PageTable.of([self.target], self.place)
        at, to = self.source_ids.to(self.place), self.target_ids.to(self.place)
        return lambda: ops.swap_pages(source, at, target, to)

    def is_right(self, move: Move) -> bool:
        """Whether `move` brings the first pages; a look at a few, as all of them are a gigabyte."""
        at, to = self.source_ids[:NUM_LOOKED_AT], self.target_ids[:NUM_LOOKED_AT]
        wanted = self.source[at.to(self.source.device)].cpu()
        places = to.to(self.target.device)
        self.target[places] = 0
        move()
        device.synchronize(self.place)
        return torch.equal(self.target[places].cpu(), wanted)

    def courier(self) -> Move:
        """As our courier chooses, on its own stream, which the current one waits for: what is timed is all of it."""
        hbm, host = (self.target, self.source) if self.direction == "H2D" else (self.source, self.target)
        hbm_ids, host_ids = self.source_ids, self.target_ids
        if self.direction == "H2D":
            hbm_ids, host_ids = host_ids, hbm_ids
        pool = Pool(PageTable.of([hbm], self.place), PageTable.of([host], self.place))
        carried = [Carried(pool, hbm_ids, host_ids)]
        courier = Courier(self.place)
        is_real = self.place.type == "cuda"

        def move() -> None:
            ticket = courier.load(carried) if self.direction == "H2D" else courier.store(carried)
            if is_real:
                ticket.end.hold_back(torch.cuda.current_stream())

        return move

    def impala_ranges(self) -> Move:
        """Our kernel over bare addresses: what vLLM's functions are given."""
        addresses = self._addresses()
        return lambda: ops.copy_ranges(*addresses(), self.place)

    def vllm_dma(self) -> Move:
        """vLLM's batched copy by the DMA engines. Raises ImportError without vLLM; the move raises RuntimeError on a
        stream on which it would copy page by page."""
        from vllm import _custom_ops

        addresses, any_order = self._addresses(), self.direction == "H2D"

        def move() -> None:
            self._check_stream()
            _custom_ops.swap_blocks_batch(*addresses(), is_src_access_order_any=any_order)

        return move

    def vllm_triton(self) -> Move:
        """vLLM's kernel; it takes the DMA engines itself for few pages. Raises as `vllm_dma`."""
        from vllm.v1.kv_offload.cpu.swap_blocks_triton import swap_blocks_batch

        addresses = self._addresses()
        chunk = min(1 << (self.source.shape[1] - 1).bit_length(), 8192)

        def move() -> None:
            self._check_stream()
            swap_blocks_batch(*addresses(), bytes_per_chunk=chunk)

        return move

    def vllm(self) -> Move:
        """As vLLM's worker chooses: its kernel for small pages to the device, else DMA."""
        from vllm.v1.kv_offload.cpu.swap_blocks_triton import THRESHOLD_BYTES

        is_small = self.direction == "H2D" and self.source.shape[1] < THRESHOLD_BYTES
        return self.vllm_triton() if is_small else self.vllm_dma()

    def torch_copies(self) -> Move:
        """A copy_ a page: DMA without a batch, where there is no vLLM."""
        pairs = [
            (self.target[to], self.source[at])
            for at, to in zip(self.source_ids.tolist(), self.target_ids.tolist(), strict=True)
        ]

        def move() -> None:
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

        return move

    def _check_stream(self) -> None:
        if not device.takes_batched_copies(self.place):
            raise RuntimeError("the driver batches no copies on the default stream")

    def _addresses(self) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        """Fills pinned memory with addresses and sizes anew for each move, as vLLM's worker does for each job."""
        size, count = self.source.shape[1], len(self.source_ids)
        pinned = self.place.type == "cuda"
        source, target, sizes = (torch.empty(count, dtype=torch.int64, pin_memory=pinned) for _ in range(3))

        def filled() -> tuple[Tensor, Tensor, Tensor]:
            torch.add(self.source.data_ptr(), self.source_ids, alpha=size, out=source)
            torch.add(self.target.data_ptr(), self.target_ids, alpha=size, out=target)
            return source, target, sizes.fill_(size)

        return filled

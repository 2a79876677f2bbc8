"""Launch numbers of the Triton kernels, and where each came from.

All untuned: none has been measured on a GPU by this project. `python -m benchmarks.gpu` measures.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Launch:
    """How much of the GPU a copy may take."""

    num_programs: int
    """At most so many at a time; each is one streaming multiprocessor at most, the rest stay with the model."""
    chunk_bytes: int
    """What a program moves in one step. A power of two."""
    num_warps: int

    @property
    def options(self) -> dict[str, int]:
        """As Triton's launcher takes them."""
        return {"num_warps": self.num_warps}


SWAP = Launch(num_programs=12, chunk_bytes=8192, num_warps=4)
"""Untuned. Programs and chunk are vLLM 0.32's for H100 on PCIe Gen5 (`v1/kv_offload/cpu/swap_blocks_triton.py`)."""

PACK = Launch(num_programs=12, chunk_bytes=8192, num_warps=4)
"""Untuned. As SWAP: the link bounds it too when the run is in host memory. Inside HBM it wants more programs."""

FP8 = Launch(num_programs=24, chunk_bytes=2048, num_warps=4)
"""Untuned. A group of 1,024 elements is a chunk; twice SWAP's programs, as each sends half of what it reads."""

DMA_FROM_BYTES = 28 << 10
"""Pages from this size on go to the device by DMA. Untuned: vLLM 0.32's, for H100 on PCIe Gen5 (as above)."""

DMA_DESCRIPTORS = 4096
"""Of one call of the driver; the first ones are under way while the next are written. Untuned: half of what vLLM 0.32
allows itself where a driver fails on more (ROCm); on CUDA it sets no bound."""

DMA_UP_TO_DESCRIPTORS = 32_768
"""Batches of more go by kernels, for one launch: each descriptor is time of the engine's thread. Untuned: the step
`worker` of `python -m benchmarks.gpu` says what one costs."""

KERNEL_FROM_PAGES = 16
"""Fewer pages of a layer than this, over all layers, are not worth a launch. Untuned: vLLM 0.32's, as above."""

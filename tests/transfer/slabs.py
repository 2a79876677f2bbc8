"""Slabs small enough to open by the dozen."""

from pathlib import Path

from impala_vllm.transfer.slab import Slab

SLOT_BYTES = 4096
BUDGET_BYTES = 1 << 20


def opened(directory: Path, num_bytes: int = BUDGET_BYTES, slot_bytes: int = SLOT_BYTES, namespace: str = "a") -> Slab:
    return Slab.open(directory, num_bytes, slot_bytes, namespace)


def index_of(slab: Slab) -> Path:
    return slab.path.with_suffix(".index")

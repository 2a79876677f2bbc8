"""Stores with their real threads and files, closed when their test ends."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from impala_vllm.transfer.block_io import BlockIo, open_block_io
from impala_vllm.transfer.limits import Limits
from impala_vllm.transfer.nvme_store import NvmeStore
from impala_vllm.transfer.slab import Slab
from tests.transfer.nvme_store.gated import GatedIo
from tests.transfer.nvme_store.items import BUDGET_BYTES, SLOT_BYTES
from tests.transfer.virtual import ManualClock

PATIENT = Limits(stuck_s=3600.0)
"""For tests in which a slow machine must not look like a stuck disk."""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., NvmeStore]]:
    stores: list[NvmeStore] = []

    def make(limits: Limits = PATIENT, wrap: Callable[[BlockIo], BlockIo] = lambda io: io, **more) -> NvmeStore:
        slab = Slab.open(tmp_path / "tier", BUDGET_BYTES, SLOT_BYTES, "a")
        stores.append(NvmeStore(slab, wrap(open_block_io(slab.fd)), limits, **more))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def gated(make) -> tuple[NvmeStore, GatedIo, ManualClock]:
    """A store on a disk that waits for the test, with a clock that does as well."""
    gates: list[GatedIo] = []
    clock = ManualClock()

    def wrap(io: BlockIo) -> GatedIo:
        gates.append(GatedIo(io))
        return gates[0]

    store = make(Limits(stuck_s=5.0), wrap, clock=clock)
    return store, gates[0], clock

"""Rigs that are taken down when their test ends."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from impala_vllm.transfer.limits import Limits
from tests.transfer.coordinator.rig import Rig


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(**limits) -> Rig:
        rigs.append(Rig(tmp_path, Limits(**limits)))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.disk.close()
        rig.slab.close()

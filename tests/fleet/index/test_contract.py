"""Every index on the contract suite."""

from impala_vllm.fleet.index import Index, IndexConfig, MaskIndex, NaiveIndex
from tests.contracts.fleet_index import IndexContract


class TestNaive(IndexContract):
    examples = 30

    def make(self, config: IndexConfig) -> Index:
        return NaiveIndex(config)


class TestMasks(IndexContract):
    def make(self, config: IndexConfig) -> Index:
        return MaskIndex(config)

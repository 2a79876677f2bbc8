"""What one router tells and another reads is an index: the contract suite, through a real Redis."""

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from impala_vllm.fleet.index import Depths, Index, IndexConfig, MaskIndex, Stats
from impala_vllm.fleet.places import BlockKey, Replica, Tier
from impala_vllm.fleet.registry import Registry, RegistryConfig, SharedIndex
from impala_vllm.fleet.registry.source import Source
from tests.contracts.fleet_index import REPLICAS, A, B, C, IndexContract

CONFIG = RegistryConfig(claim_s=1e9, lease_s=600.0, believed_s=1e9, within_s=60.0)


class Pair(Index):
    """Told to one router's index, asked of another's; they meet in Redis before each question."""

    def __init__(self, url: str, loop: asyncio.AbstractEventLoop, config: IndexConfig, name: str) -> None:
        self._loop = loop
        self.teller, self.reader = SharedIndex(MaskIndex(config)), SharedIndex(MaskIndex(config))
        replicas = {*REPLICAS, B, C}
        self._told_s = 0.0
        self._is_behind = True
        heard = {r: Source(name, "life", True) for r in replicas}
        unheard = {r: Source(name, "life", False) for r in replicas}
        self._sides = [
            Registry(url, self.teller, lambda: heard, {}, CONFIG, lambda: self._told_s),
            Registry(url, self.reader, lambda: unheard, {}, CONFIG, lambda: self._told_s),
        ]

    async def meet(self) -> None:
        for side in self._sides:
            assert await side.beat(), side.problem

    async def close(self) -> None:
        for side in self._sides:
            await side.leave()

    def _change(self, now: float | None = None) -> None:
        if now is not None and now != self._told_s:  # what was told before is as old as it is
            self._meet()
            self._told_s = now
        self._is_behind = True

    def _meet(self) -> None:
        if self._is_behind:
            self._is_behind = False
            self._loop.run_until_complete(self.meet())

    def store(self, replica: Replica, tier: Tier, keys: Sequence[BlockKey], now: float) -> None:
        self._change(now)
        self.teller.store(replica, tier, keys, now)

    def remove(self, replica: Replica, tier: Tier, keys: Sequence[BlockKey]) -> None:
        self._change()
        self.teller.remove(replica, tier, keys)

    def clear(self, replica: Replica, tier: Tier | None = None) -> None:
        self._change()
        self.teller.clear(replica, tier)

    def touch(self, keys: Sequence[BlockKey], now: float) -> None:
        self._change(now)
        self.teller.touch(keys, now)

    def expire(self, now: float) -> None:
        self._meet()
        self.teller.expire(now)
        self.reader.expire(now)

    def prefixes(self, chain: Sequence[BlockKey]) -> Mapping[Replica, Depths]:
        self._meet()
        return self.reader.prefixes(chain)

    def holds(self, replica: Replica, key: BlockKey) -> frozenset[Tier]:
        self._meet()
        return self.reader.holds(replica, key)

    def num_replicas(self, key: BlockKey) -> int:
        self._meet()
        return self.reader.num_replicas(key)

    def stats(self) -> Stats:
        """The reader's; removals in vain are not told."""
        self._meet()
        return self.reader.stats()._replace(num_unheld=self.teller.stats().num_unheld)

    def check_invariants(self) -> None:
        self.teller.local.check_invariants()
        self.reader.local.check_invariants()


class TestThroughRedis(IndexContract):
    examples = 8

    @pytest.fixture(autouse=True)
    def _redis(self, redis_server):
        self._loop = asyncio.new_event_loop()
        self._url, self._pairs = redis_server.url, []
        yield
        for pair in self._pairs:
            self._loop.run_until_complete(pair.close())
        self._loop.close()

    def make(self, config: IndexConfig) -> Index:
        pair = Pair(self._url, self._loop, config, f"{id(self)}-{len(self._pairs)}")
        self._pairs.append(pair)
        return pair


def test_the_contract_is_about_what_was_read(redis_server):
    loop = asyncio.new_event_loop()
    pair = Pair(redis_server.url, loop, IndexConfig(), "read")
    pair.store(A, Tier.HBM, [BlockKey(1)], 0.0)
    assert not pair.reader.local.stats().num_blocks
    assert pair.holds(A, BlockKey(1))
    assert A in pair.reader.heard
    loop.run_until_complete(pair.close())
    loop.close()

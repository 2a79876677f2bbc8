"""What every index must do: `class TestMine(IndexContract)` with a `make` that gives an empty one."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impala_vllm.fleet.index import Depths, Index, IndexConfig, NaiveIndex
from impala_vllm.fleet.places import BlockKey, Replica, ServerId, Tier, keys_of

A, B, C = (Replica(ServerId(name)) for name in "abc")
REPLICAS = [A, B, C, Replica(ServerId("a"), 1)]


def chain(seed: int, length: int) -> list[BlockKey]:
    """Keys as spread as real ones."""
    return keys_of((seed * 1_000_003 + i) * 0x9E3779B97F4A7C15 for i in range(1, length + 1))


class IndexContract:
    """Override `make`."""

    examples = 200

    def make(self, config: IndexConfig) -> Index:
        raise NotImplementedError

    @pytest.fixture
    def index(self) -> Index:
        return self.make(IndexConfig())

    def test_an_empty_index_knows_of_nobody(self, index):
        assert dict(index.prefixes(chain(1, 5))) == {}
        assert dict(index.prefixes([])) == {}
        assert index.stats()[:2] == (0, 0)

    def test_a_prefix_is_as_long_as_the_blocks_in_a_row_from_the_root(self, index):
        blocks = chain(1, 300)
        for length in (1, 63, 64, 65, 128, 299, 300):
            index.clear(A)
            index.store(A, Tier.HBM, blocks[:length], 0.0)
            assert dict(index.prefixes(blocks)) == {A: Depths(length, length, length, length)}
        index.store(B, Tier.HBM, blocks[:70], 0.0)
        assert index.prefixes(blocks[:100]) == {A: Depths(*[100] * 4), B: Depths(*[70] * 4)}
        assert index.prefixes(chain(2, 1) + blocks) == {}

    def test_a_tier_further_down_reaches_further(self, index):
        blocks = chain(1, 200)
        index.store(A, Tier.HBM, blocks[:50], 0.0)
        index.store(A, Tier.HOST, blocks[:120], 0.0)
        index.store(A, Tier.NVME, blocks[90:180], 0.0)
        index.store(A, Tier.REMOTE, blocks, 0.0)
        assert index.prefixes(blocks) == {A: Depths(50, 120, 180, 200)}
        assert index.holds(A, blocks[100]) == {Tier.HOST, Tier.NVME, Tier.REMOTE}

    def test_ranks_of_a_server_are_apart(self, index):
        index.store(Replica(ServerId("a"), 1), Tier.HBM, chain(1, 3), 0.0)
        assert list(index.prefixes(chain(1, 3))) == [Replica(ServerId("a"), 1)]

    def test_a_block_is_held_as_long_as_a_copy_is_left(self, index):
        (block,) = chain(1, 1)
        index.store(A, Tier.HBM, [block, block], 0.0)
        index.store(A, Tier.HBM, [block], 0.0)
        for expected in ({Tier.HBM}, {Tier.HBM}, set()):
            index.remove(A, Tier.HBM, [block])
            assert index.holds(A, block) == expected
        index.remove(A, Tier.HBM, [block])
        assert index.stats().num_unheld == 1
        index.store(A, Tier.HBM, [block], 0.0)
        index.remove(A, Tier.HBM, [block])
        assert index.holds(A, block) == set()

    def test_a_cleared_replica_starts_from_nothing(self, index):
        blocks = chain(1, 100)
        index.store(A, Tier.HBM, [*blocks, *blocks], 0.0)
        index.store(A, Tier.HOST, blocks[:10], 0.0)
        index.store(B, Tier.HBM, blocks[:20], 0.0)
        index.clear(A, Tier.HBM)
        assert index.prefixes(blocks) == {A: Depths(0, 10, 10, 10), B: Depths(*[20] * 4)}
        index.clear(A)
        assert index.prefixes(blocks) == {B: Depths(*[20] * 4)}
        index.store(C, Tier.HBM, blocks[:5], 0.0)
        index.store(A, Tier.HBM, blocks[:7], 0.0)
        index.remove(A, Tier.HBM, blocks[6:7])
        assert index.prefixes(blocks) == {A: Depths(*[6] * 4), B: Depths(*[20] * 4), C: Depths(*[5] * 4)}

    def test_replicas_that_hold_a_block_are_counted_once(self, index):
        (block,) = chain(1, 1)
        index.store(A, Tier.HBM, [block, block], 0.0)
        index.store(A, Tier.HOST, [block], 0.0)
        index.store(B, Tier.NVME, [block], 0.0)
        index.store(C, Tier.REMOTE, [block], 0.0)
        assert index.num_replicas(block) == 2

    def test_what_is_old_is_forgotten_unless_it_is_touched(self):
        index = self.make(IndexConfig(ttl_s=80.0))
        old, touched, young = chain(1, 10), chain(2, 10), chain(3, 10)
        index.store(A, Tier.HBM, [*old, *touched], 0.0)
        index.touch(touched, 60.0)
        index.store(A, Tier.HBM, young, 60.0)
        index.expire(79.0)
        assert A in index.prefixes(old)
        index.expire(95.0)
        assert index.prefixes(old) == {}
        assert index.prefixes(touched)[A].hbm == index.prefixes(young)[A].hbm == 10
        assert index.stats().num_forgotten == 10
        index.expire(1000.0)
        assert index.stats()[:2] == (0, 0)

    def test_room_is_bounded_and_the_oldest_go_first(self):
        index = self.make(IndexConfig(max_bytes=400_000))
        for seed in range(300):
            index.store(A, Tier.HBM, chain(seed, 50), float(seed))
            if seed % 10 == 0:
                index.expire(float(seed))
        index.expire(300.0)
        found = index.stats()
        assert found.num_bytes <= 400_000
        assert found.num_blocks >= 500
        assert A in index.prefixes(chain(299, 50))
        assert index.prefixes(chain(0, 50)) == {}

    def test_it_agrees_with_the_specification_on_chains_without_holes(self):
        """Chains grow at their ends and shrink from them, on several replicas and tiers, with clears in between."""
        lengths = st.integers(0, 150)
        move = st.tuples(st.sampled_from(REPLICAS), st.sampled_from(list(Tier)[:3]), st.integers(0, 3), lengths)

        @settings(max_examples=self.examples)
        @given(st.lists(move, max_size=25), st.sets(st.integers(0, 24), max_size=3))
        def check(moves: list[Any], clears: set[int]) -> None:
            self._run(moves, clears)

        check()

    def test_across_holes_the_last_block_of_an_answer_is_held(self):
        spans = st.tuples(st.integers(0, 149), st.integers(1, 40))
        move = st.tuples(st.booleans(), st.sampled_from(REPLICAS), st.sampled_from(list(Tier)), spans)

        @settings(max_examples=self.examples)
        @given(st.lists(move, max_size=25))
        def check(moves: list[Any]) -> None:
            blocks, index, spec = chain(1, 150), self.make(IndexConfig()), NaiveIndex()
            for is_store, replica, tier, (start, length) in moves:
                keys = blocks[start : start + length]
                for each in (index, spec):
                    each.store(replica, tier, keys, 0.0) if is_store else each.remove(replica, tier, keys)
            self.check(index)
            assert index.stats()[:2] == spec.stats()[:2]
            assert index.stats().num_unheld == spec.stats().num_unheld
            expected = spec.prefixes(blocks)
            for replica, depths in index.prefixes(blocks).items():
                assert list(depths) == sorted(depths)
                for reach, depth in enumerate(depths):
                    assert depth >= expected.get(replica, Depths(0, 0, 0, 0))[reach]
                    assert depth == 0 or min(index.holds(replica, blocks[depth - 1])) <= reach
            for block in blocks[::7]:
                assert index.num_replicas(block) == spec.num_replicas(block)
                assert [index.holds(r, block) for r in REPLICAS] == [spec.holds(r, block) for r in REPLICAS]

        check()

    def _run(self, moves: list[Any], clears: set[int]) -> None:
        index, spec = self.make(IndexConfig()), NaiveIndex()
        stem = chain(9, 40)
        chains = [stem + chain(seed, 110) for seed in range(4)]
        lengths: dict[tuple[Replica, Tier, int], int] = {}
        for number, (replica, tier, which, length) in enumerate(moves):
            if number in clears:
                for each in (index, spec):
                    each.clear(replica, tier)
                lengths = {place: n for place, n in lengths.items() if place[:2] != (replica, tier)}
            before = lengths.get((replica, tier, which), 0)
            lengths[replica, tier, which] = length
            for each in (index, spec):
                if length > before:
                    each.store(replica, tier, chains[which][before:length], float(number))
                else:
                    each.remove(replica, tier, chains[which][length:before])
            self.check(index)
        for blocks in chains:
            assert dict(index.prefixes(blocks)) == dict(spec.prefixes(blocks))
        assert index.stats()[:2] == spec.stats()[:2]

    def check(self, index: Index) -> None:
        """Invariants, where an index has some to check."""
        checks: Callable[[], None] = getattr(index, "check_invariants", lambda: None)
        checks()

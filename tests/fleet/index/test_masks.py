"""What is particular to masks: room is made a few shards at a time."""

import pytest

from impala_vllm.fleet.index import IndexConfig, MaskIndex, masks
from impala_vllm.fleet.places import Tier
from tests.contracts.fleet_index import A, chain

ROOM = 6400
CONFIG = IndexConfig(max_bytes=ROOM * masks.BYTES_A_BLOCK)


@pytest.fixture
def cleaned(monkeypatch) -> list[int]:
    """Entries that were looked at, a number a shard."""
    looked: list[int] = []
    clean = MaskIndex._clean

    def noted(self: MaskIndex) -> int:
        looked.append(clean(self))
        return looked[-1]

    monkeypatch.setattr(MaskIndex, "_clean", noted)
    return looked


def test_making_room_looks_at_so_many_entries_a_call_and_ends(monkeypatch, cleaned):
    monkeypatch.setattr(masks, "_CLEANED_A_TICK", 200)
    index = MaskIndex(CONFIG)
    for seed in range(10):
        index.store(A, Tier.HBM, chain(seed, 720), float(seed))
    num_calls = 0
    while index.stats().num_bytes > CONFIG.max_bytes:
        cleaned.clear()
        index.expire(20.0)
        num_calls += 1
        assert index.stats().num_blocks <= ROOM  # at once; only memory comes later
        assert sum(cleaned) <= 2 * 200 + 200  # 800 beyond the room: twice as many, and the rest of a shard
    assert num_calls > 3
    index.check_invariants()


def test_while_more_comes_than_a_call_cleans_the_index_stays_near_its_bound(monkeypatch):
    monkeypatch.setattr(masks, "_CLEANED_A_TICK", 500)
    index = MaskIndex(CONFIG)
    most = 0
    for tick in range(300):
        index.store(A, Tier.HBM, chain(tick, 100), float(tick))
        index.expire(float(tick))
        most = max(most, index.stats().num_bytes)
    assert CONFIG.max_bytes < most < 1.25 * CONFIG.max_bytes
    index.check_invariants()

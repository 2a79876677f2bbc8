"""Host and NVMe below HBM: what lies where, what a link takes, and that nobody waits for ever."""

import random

import pytest
from msgspec import structs

from impala_vllm.sim.loop import Loop
from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.policies.impala import Impala
from impala_vllm.sim.simulation import Setup, run
from impala_vllm.sim.tiers import Line, Room, Store
from tests.sim.scenes import BLOCK, TIMING, Scene, session, workload
from tests.sim.test_simulation import agents

LINKED = structs.replace(
    TIMING, host_bytes_per_s=200.0, nvme_read_bytes_per_s=40.0, nvme_write_bytes_per_s=40.0
)  # fmt: skip
BLOCK_BYTES = TIMING.kv_bytes_per_token * BLOCK


def room(host_blocks, nvme_blocks=0, rate=200.0, nvme_rate=40.0):
    return Room(host_blocks, nvme_blocks, BLOCK_BYTES, rate, nvme_rate, nvme_rate)


def test_a_line_carries_one_transfer_after_the_other():
    loop, seen = Loop(), list[tuple[float, float]]()
    line = Line(loop, 10.0)
    for num_bytes in (20, 50):
        line.send(num_bytes, lambda took_s: seen.append((loop.now, took_s)))
    assert line.wait_s() == 7.0
    loop.run()
    assert seen == [(2.0, 2.0), (7.0, 5.0)]
    assert line.num_bytes == 70


def test_a_full_tier_gives_up_the_tail_of_what_was_used_longest_ago():
    store = Store(4)
    for chain in ([1, 2], [3, 4]):
        store.reserve(chain)
        store.commit(chain)
    store.touch([1, 2])
    store.reserve([5])
    assert not store.is_ready(4)
    assert all(store.is_ready(k) for k in (1, 2, 3))


def test_what_is_read_stays_and_all_or_nothing_changes_nothing():
    store = Store(2)
    store.reserve([1, 2])
    store.commit([1, 2])
    store.pin([1])
    assert not store.reserve_all([3, 4])
    assert store.is_ready(2)
    assert store.reserve([3, 4]) == [3]
    store.unpin([1])
    assert store.may_go(1)


def in_and_out(below, policy=KINDS["stock"].make):
    """A session whose HBM another one takes while it is in a tool."""
    load = workload(session("a", [16, 20], output=1, gap_s=60.0), session("b", [24], output=1))
    scene = Scene(load, num_blocks=7, policy=policy, below=below).play(0.0, 20.0)
    return scene, next(s for s in scene.client.served if s.index == 1)


def test_what_hbm_lost_is_loaded_from_host_and_not_computed():
    _, without = in_and_out(None)
    scene, served = in_and_out(room(host_blocks=20))
    assert without.cached_tokens < served.cached_tokens == 16
    # a is back at 69 s. It has lost `lost` blocks of 40 bytes, which come at 200 a second; then 4 tokens are computed.
    lost = (16 - without.cached_tokens) // BLOCK
    assert served.first_s == pytest.approx(69.0 + lost * 40 / 200 + 1.0 + 4 * 0.5)
    assert scene.replica.tiers.loads.num_bytes == lost * 40
    assert scene.replica.recomputed_tokens == 0


def test_what_host_lost_comes_back_through_nvme():
    scene, served = in_and_out(room(host_blocks=6, nvme_blocks=40))
    assert served.cached_tokens == 16
    assert scene.replica.tiers.reads.num_bytes > 0
    assert scene.replica.recomputed_tokens == 0


def test_everything_computed_is_written_through_once():
    scene, _ = in_and_out(room(host_blocks=40, nvme_blocks=40))
    tiers = scene.replica.tiers
    # a's first turn fills 4 blocks, its second one more; b's fills 6.
    assert tiers.stores.num_bytes == tiers.writes.num_bytes == 11 * 40


@pytest.mark.parametrize("name", [n for n, k in KINDS.items() if not k.is_unbounded])
@pytest.mark.parametrize("nvme", [0, 2000])
def test_every_turn_is_served_whatever_the_tiers(name, nvme):
    load, setup = agents(count=5, turns=4), Setup(LINKED, 120, host_tokens=100, nvme_tokens=nvme)
    found = run(load, setup, KINDS[name])
    assert found.measures.bytes_moved > 0
    assert found == run(load, setup, KINDS[name])


@pytest.mark.parametrize("name", ["stock", "impala"])
def test_a_fast_host_that_holds_everything_saves_all_recomputation_but_the_first(name):
    fast = structs.replace(LINKED, host_bytes_per_s=1e9)
    alone = run(agents(), Setup(fast, 140), KINDS[name]).measures
    below = run(agents(), Setup(fast, 140, host_tokens=4000), KINDS[name]).measures
    assert below.recomputed_tokens < 0.1 * alone.recomputed_tokens
    assert below.stall_mean_s < alone.stall_mean_s


def test_impala_computes_what_a_slow_link_would_bring_later():
    slow = structs.replace(LINKED, host_bytes_per_s=1.0)
    stock, impala = (run(agents(), Setup(slow, 140, host_tokens=4000), KINDS[n]).measures for n in ("stock", "impala"))
    # A block takes 40 s to come and 2 s to compute. Until it has seen that, impala believes in its prior.
    assert impala.stall_mean_s < 0.5 * stock.stall_mean_s


def test_impala_recalls_what_a_silent_session_will_ask_for():
    below = room(host_blocks=6, nvme_blocks=40, nvme_rate=400.0)
    _, stock = in_and_out(below)
    _, served = in_and_out(below, Impala)
    assert served.cached_tokens == 16
    assert served.first_s <= stock.first_s


@pytest.mark.parametrize("seed", range(3))
def test_a_tier_never_holds_more_than_it_can(seed):
    rng = random.Random(seed)
    store = Store(8)
    filling: list[int] = []
    pinned: list[int] = []
    for key in range(400):
        fitting = store.reserve([k for k in (key, key + 1000) if k not in store])
        filling += fitting
        rng.shuffle(filling)
        while filling and rng.random() < 0.7:
            done = filling.pop()
            store.commit([done])
            if rng.random() < 0.3:
                store.pin([done])
                pinned.append(done)
        while pinned and rng.random() < 0.4:
            gone = pinned.pop(rng.randrange(len(pinned)))
            assert store.is_ready(gone)
            store.unpin([gone])
        store.check_invariants()

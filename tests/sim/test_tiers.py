"""Host and NVMe below HBM: what lies where, what a link takes, and that nobody waits for ever."""

import pytest
from msgspec import structs

from impala_vllm.sim.loop import Loop
from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.policies.impala import Impala
from impala_vllm.sim.request import Request
from impala_vllm.sim.simulation import Setup, run
from impala_vllm.sim.tiers import MAX_PASSES, Line, Room, Tiers
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


def test_impala_reads_what_a_session_asks_for_again():
    below = room(host_blocks=6, nvme_blocks=40, nvme_rate=400.0)
    _, stock = in_and_out(below)
    _, served = in_and_out(below, Impala)
    assert served.cached_tokens == 16
    assert served.first_s <= stock.first_s


def requests(*prompts):
    """Turns of one-block-a-key prompts, as a replica would hand them to its tiers."""
    load = workload(*(session(f"s{i}-", [tokens], output=1) for i, tokens in enumerate(prompts)))
    return [Request(s, 0, s.session_id, 0.0, lambda _: None) for s in load.sessions]


def served(tiers, loop, request, num_blocks):
    """A step computes so many blocks of a request, which ends with it."""
    tiers.poll()
    tiers.scheduled(request, num_blocks)
    tiers.planned()
    tiers.stepped()
    loop.run()
    tiers.poll()
    tiers.finished(request, num_blocks)
    tiers.planned()


def test_a_step_stores_all_of_a_requests_blocks_or_none_and_offers_them_again():
    loop = Loop()
    tiers = Tiers(loop, room(host_blocks=6))
    long, longer = requests(16, 20)
    tiers.scheduled(long, 4)
    tiers.planned()
    tiers.scheduled(longer, 3)
    # Two places are free, and those of the other are not filled yet.
    assert not any(k in tiers.host for k in longer.keys)
    tiers.stepped()
    loop.run()
    tiers.poll()
    tiers.scheduled(longer, 5)
    assert all(k in tiers.host for k in longer.keys)
    assert [k in tiers.host for k in long.keys] == [False, False, False, True]


def test_blocks_of_a_turn_that_runs_go_root_first_and_those_of_one_that_ended_tail_first():
    loop = Loop()
    tiers = Tiers(loop, room(host_blocks=8))
    ended, runs, new = requests(16, 16, 8)
    tiers.scheduled(runs, 4)
    tiers.stepped()
    served(tiers, loop, ended, 4)
    tiers.scheduled(new, 2)
    assert [k in tiers.host for k in runs.keys] == [False, False, True, True]
    tiers.finished(runs, 4)
    tiers.planned()
    (newer,) = requests(8)[:1]
    newer.keys = (901, 902)
    tiers.scheduled(newer, 2)
    assert [k in tiers.host for k in ended.keys] == [True, True, False, False]


def test_a_load_hides_the_blocks_before_it_from_host():
    loop = Loop()
    tiers = Tiers(loop, room(host_blocks=8))
    (request,) = requests(24)
    served(tiers, loop, request, 4)
    request.num_output = 0
    tiers.load(request, 2, request.keys[2:4], lambda: None)
    loop.run()
    tiers.poll()
    tiers.host.evict(request.keys[:1])
    tiers.scheduled(request, 6)
    assert [k in tiers.host for k in request.keys] == [False, True, True, True, True, True]


def test_who_finds_blocks_on_nvme_waits_for_them_and_a_load_under_way_is_waited_for():
    loop = Loop()
    tiers = Tiers(loop, room(host_blocks=4, nvme_blocks=20))
    first, second = requests(16, 16)
    for request in (first, second):
        served(tiers, loop, request, 4)
        loop.run()
    tiers.poll()
    assert not any(k in tiers.host for k in first.keys)
    assert tiers.reach(first, 0, 4) is None
    loop.run()
    tiers.poll()
    assert tiers.reach(first, 0, 4) == 4
    tiers.load(first, 0, first.keys, lambda: None)
    assert tiers.reach(first, 0, 4) is None
    loop.run()
    tiers.poll()
    assert tiers.reach(first, 0, 4) == 4


def test_a_prompt_larger_than_host_is_computed_after_so_many_attempts():
    loop = Loop()
    tiers = Tiers(loop, room(host_blocks=3, nvme_blocks=20))
    (request,) = requests(20)
    for end in range(1, 6):
        tiers.scheduled(request, end)
        tiers.planned()
        tiers.stepped()
        loop.run()
        tiers.poll()
        loop.run()
        tiers.poll()
    assert all(tiers.nvme.is_ready(k) for k in request.keys)
    for _ in range(MAX_PASSES):
        assert tiers.reach(request, 0, 5) is None
        loop.run()
        tiers.poll()
    assert tiers.reach(request, 0, 5) is not None

"""What comes back from NVMe, and what a restart makes of it."""

from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import Locality, Medium, TierFilter, TierMatcher
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from impala_vllm.adapters.vllm.tiers.nvme import LATE_S, NvmeTier
from tests.adapters.vllm.tiers.moving_bytes import CHUNK_BYTES
from tests.adapters.vllm.tiers.whole import A, B, Tiers, keys, names, on_nvme, promote


def test_what_nvme_has_is_read_into_host_before_it_is_promised() -> None:
    tiers = Tiers(4, nvme=8)
    prompt = on_nvme(tiers, "a", 3)
    request = tiers.arrive("r", prompt, A)
    assert tiers.lookup(request) == 0
    assert promote(tiers, request)
    assert tiers.lookup(request) is None
    tiers.step(1.0)
    assert tiers.lookup(request) == 3
    assert tiers.manager.get_load_source(prompt[0], request.context) is CacheHitSource.DISK
    tiers.complete(request, tiers.load(request, 3))
    assert tiers.manager.get_load_source(prompt[0], request.context) is CacheHitSource.HOST
    tiers.finish(request)
    tiers.check_nothing_moves()


def test_a_chunk_keeps_its_place_on_nvme_while_it_is_read() -> None:
    tiers = Tiers(8, nvme=4)
    request = tiers.arrive("r", on_nvme(tiers, "a", 4), A)
    tiers.disk._seconds = 10.0
    promote(tiers, request)
    tiers.manager.forget(A)  # worth nothing, but still being read
    tiers.serve("s", keys("b", 2), B)
    assert tiers.nvme is not None
    assert names(tiers.nvme.pool.keys()) == names(request.keys)
    assert tiers.nvme.demotions.num_unplaced == 2
    tiers.finish(request)
    tiers.step(10.0)
    tiers.check_nothing_moves()


def test_a_read_that_is_late_is_not_waited_for() -> None:
    tiers = Tiers(4, nvme=8)
    request = tiers.arrive("r", on_nvme(tiers, "a", 3), A)
    tiers.disk._seconds = 1000.0
    promote(tiers, request)
    tiers.clock.advance(LATE_S + 0.1)
    assert tiers.lookup(request) == 0
    assert tiers.compute(request, 3) is None, "its slots are still being filled"
    tiers.finish(request)
    tiers.step(1000.0)
    tiers.check_nothing_moves()


def test_a_chunk_that_cannot_be_read_is_a_miss_and_forgotten() -> None:
    tiers = Tiers(4, nvme=8)
    prompt = on_nvme(tiers, "a", 3)
    tiers.disk.fails = lambda key: key == prompt[1]
    request = tiers.arrive("r", prompt, A)
    promote(tiers, request)
    tiers.step(1.0)
    assert tiers.nvme is not None
    assert tiers.lookup(request) == 1
    assert prompt[1] not in tiers.nvme.here
    assert prompt[2] in tiers.nvme.here
    assert tiers.nvme.num_failed == 1
    tiers.finish(request)
    tiers.check_nothing_moves()


def test_a_turn_that_waits_for_its_tail_does_not_evict_its_own_root() -> None:
    tiers = Tiers(4, nvme=8)
    prompt = on_nvme(tiers, "a", 8)
    request = tiers.arrive("r", prompt, None)  # nobody's: its chunks are the first to go
    assert promote(tiers, request)
    tiers.step(1.0)
    assert tiers.lookup(request) == 4
    assert not promote(tiers, request)
    assert tiers.lookup(request) == 4


def test_a_turn_does_not_evict_a_stem_of_its_own_either() -> None:
    tiers = Tiers(4, nvme=8)
    prompt = on_nvme(tiers, "a", 4)
    tiers.serve("r", prompt[:3], B, stem=3)  # stems beyond half of the tier are the first to go
    tiers.serve("s", keys("b", 1), B)
    tiers.step(1.0)
    request = tiers.arrive("t", prompt, A, stem=3)
    assert promote(tiers, request)
    tiers.step(1.0)
    assert tiers.lookup(request) == 4


@pytest.mark.parametrize("policy", [True, False])
@pytest.mark.parametrize(
    ("load_from", "reads"),
    [
        (TierFilter.ALL, True),
        (TierFilter((TierMatcher(Medium.STORAGE),)), True),
        (TierFilter((TierMatcher(Medium.CPU), TierMatcher(locality=Locality.REMOTE))), False),
        (TierFilter(), False),
    ],
    ids=["all", "storage", "others", "none"],
)
def test_a_request_may_name_the_tiers_that_it_loads_from(policy: bool, load_from: TierFilter, reads: bool) -> None:
    tiers = Tiers(4, nvme=4, policy=policy)
    prompt = on_nvme(tiers, "a", 2)
    request = tiers.arrive("r", prompt, A, load_from=load_from)
    assert tiers.turn("r").skips_nvme is not reads
    if not policy:
        assert tiers.lookup(request) == (None if reads else 0)
        assert bool(tiers.disk.num_jobs) is reads
    promote(tiers, tiers.arrive("s", prompt, A))  # for somebody else
    assert tiers.lookup(request) == (None if reads else 0)
    tiers.step(1.0)
    assert tiers.lookup(request) == 2, "host is the tier that all goes through"


def restarted(tiers: Tiers) -> NvmeTier:
    """What the next process makes of the slab."""
    disk: Any = tiers.disk
    recovered, _ = tiers.disk.records.by_key()
    return NvmeTier(disk, len(tiers.disk.slots), recovered, tiers.memory.row, CHUNK_BYTES)


def spared_last(tier: NvmeTier) -> list[str]:
    return names(tier.chains.victims(len(tier.pool), tier.pool.evictable))[::-1]


def grown(tiers: Tiers, num_outputs: int = 3) -> None:
    """A, then B, have two turns each behind a stem; what they put out is stored bit by bit."""
    for trace_id in (A, B):
        history = keys("stem", 2)
        for turn in range(2):
            history = history + keys(f"{trace_id}-in{turn}-", 2)
            request = tiers.arrive(f"{trace_id}{turn}", history, trace_id, stem=2)
            tiers.compute(request, len(history))
            tiers.settle(request)
            for i in range(num_outputs):
                request.keys = request.keys + keys(f"{trace_id}-out{turn}-{i}-", 1)
                tiers._name(request)
                tiers.compute(request, 1)
                tiers.settle(request)
                tiers.step(1.0)
            tiers.finish(request, stem=2)
            tiers.step(1.0)
            history = request.keys


@pytest.mark.parametrize("policy", [True, False])
def test_after_a_restart_the_trace_silent_longest_goes_first_and_every_trace_from_its_tail(policy: bool) -> None:
    tiers = Tiers(64, nvme=64, policy=policy)
    grown(tiers)
    newest, oldest = (tiers.requests[f"{trace_id}1"].keys for trace_id in (B, A))
    assert spared_last(restarted(tiers)) == names(newest) + names(oldest[2:])


def test_pressure_after_a_restart_leaves_no_islands() -> None:
    tiers = Tiers(64, nvme=64)
    grown(tiers)
    chains = [names(tiers.requests[f"{trace_id}1"].keys) for trace_id in (A, B)]
    order = spared_last(restarted(tiers))
    for number in range(len(order)):
        left = set(order[:number])
        for chain in chains:
            held = [name in left for name in chain]
            assert held == sorted(held, reverse=True), "a root has gone before its tail"

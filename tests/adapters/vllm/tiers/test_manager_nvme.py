"""What goes on to NVMe, what comes back, and what a restart makes of it."""

from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import Locality, Medium, TierFilter, TierMatcher
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from impala_vllm.adapters.vllm import snapshot
from impala_vllm.adapters.vllm.tiers.nvme import LATE_S, NvmeTier
from impala_vllm.core.planner import Below
from impala_vllm.core.types import TraceId
from impala_vllm.transfer.limits import Limits, staging_bytes
from tests.adapters.vllm.tiers.moving_bytes import CHUNK_BYTES
from tests.adapters.vllm.tiers.whole import TOKENS, A, B, C, Request, Tiers, keys, names, on_nvme, promote


def test_writes_go_on_to_nvme_as_they_are_stored_where_the_turn_says_so() -> None:
    tiers = Tiers(8, nvme=8)
    tiers.serve("r", keys("a", 3), A, writes=True)
    tiers.serve("s", keys("b", 3), B, writes=False)
    tiers.step(1.0)
    assert tiers.nvme is not None
    assert names(tiers.nvme.pool.keys()) == names(keys("a", 3))


def undecided(tiers: Tiers, answers: list[bool | None]) -> Request:
    """A first turn of A that has stored two chunks, while it was asked in vain whether it writes."""
    request = tiers.arrive("r", keys("a", 3), A, writes=False)
    tiers.turn("r").may_write = lambda: answers[0]
    tiers.manager.turns.undecided.add(A)
    tiers.compute(request, 2)
    tiers.settle(request)
    return request


def test_what_may_have_to_be_written_goes_last_in_host_until_the_turn_ends() -> None:
    tiers = Tiers(4, nvme=8)
    request = undecided(tiers, [None])
    tiers.serve("s", keys("b", 2), B)
    tiers.step(1.0)
    tiers.idle.update(A, 0, 2 * TOKENS, False, tiers.clock())  # worth nothing, B is as dear as can be
    tiers.idle.update(B, 0, 2 * TOKENS, True, tiers.clock(), Below(2 * TOKENS), is_running=True)
    tiers.serve("u", keys("d", 2), TraceId("d"))
    assert names(tiers.manager.host.pool.keys()) == names(keys("a", 2) + keys("d", 2))
    tiers.finish(request, writes=True)
    tiers.step(1.0)
    assert tiers.nvme is not None
    assert set(keys("a", 2)) <= set(tiers.nvme.pool.keys())
    tiers.serve("t", keys("c", 4), C)
    assert names(tiers.manager.host.pool.keys()) == names(keys("c", 4))


def test_first_turns_of_an_unknown_kind_do_not_keep_host_from_others() -> None:
    tiers = Tiers(4, nvme=8)
    for trace_id in (A, B):
        request = tiers.arrive(f"r-{trace_id}", keys(trace_id, 2), trace_id, writes=False)
        tiers.turn(request.req_id).may_write = lambda: None
        tiers.manager.turns.undecided.add(trace_id)
        tiers.compute(request, 2)
        tiers.settle(request)
    prompt = on_nvme(tiers, "c", 2, C)
    assert tiers.manager.num_refused == 0
    tiers.serve("d", keys("d", 4), TraceId("d"), writes=False)
    assert promote(tiers, tiers.arrive("s", prompt, C))


@pytest.mark.parametrize(("answer", "number"), [(True, 3), (False, 0)])
def test_a_turn_whose_kind_shows_what_it_does_meanwhile_is_decided(answer: bool, number: int) -> None:
    tiers = Tiers(4, nvme=8)
    answers: list[bool | None] = [None]
    request = undecided(tiers, answers)
    answers[0] = answer
    tiers.compute(request, 1)
    tiers.settle(request)
    assert not tiers.manager.turns.undecided
    tiers.step(1.0)
    assert tiers.nvme is not None
    assert len(tiers.nvme.pool) == number


def test_a_trace_that_is_forgotten_is_undecided_no_more() -> None:
    tiers = Tiers(4, nvme=8)
    request = undecided(tiers, [None])
    tiers.manager.forget(A)
    assert not tiers.manager.turns.undecided
    tiers.finish(request, writes=False)
    tiers.check_nothing_moves()


def test_a_turn_that_is_worth_it_only_at_its_end_is_written_then() -> None:
    tiers = Tiers(8, nvme=8)
    request = tiers.arrive("r", keys("a", 3), A, writes=False)
    tiers.compute(request, 3)
    tiers.settle(request)
    tiers.finish(request, keys("a-out", 1), writes=True)
    tiers.settle(request)
    tiers.step(1.0)
    assert tiers.nvme is not None
    assert len(tiers.nvme.pool) == 4
    tiers.check_nothing_moves()


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


def test_a_turn_larger_than_the_stores_queue_is_written_as_far_as_there_is_room(monkeypatch: Any) -> None:
    monkeypatch.setattr("impala_vllm.adapters.vllm.tiers.demotions.WRITE_BYTES", 2 * CHUNK_BYTES)
    tiers = Tiers(16, nvme=16)
    accept = tiers.disk.submit_write
    tiers.disk.submit_write = lambda *job: tiers.disk.num_jobs < 3 and accept(*job)  # type: ignore[method-assign]
    tiers.serve("r", keys("a", 9), A)
    tiers.step(1.0)
    assert tiers.nvme is not None
    assert names(tiers.nvme.pool.keys()) == names(keys("a", 6))
    tiers.finish(tiers.arrive("s", keys("a", 9), A))
    tiers.step(1.0)
    assert len(tiers.nvme.pool) == 9
    tiers.check_nothing_moves()


def test_what_was_written_today_is_told() -> None:
    tiers = Tiers(4, nvme=8)
    tiers.disk.write_bytes_today = 5
    assert tiers.manager.stats()["nvme_write_today_bytes"] == 5.0


def test_what_waits_for_a_slow_disk_leaves_host_to_others() -> None:
    tiers = Tiers(64, nvme=256)
    tiers.disk.limits = Limits(max_queued_write_bytes=staging_bytes(64 * CHUNK_BYTES, CHUNK_BYTES))
    tiers.disk._seconds = 1000.0
    for i in range(8):
        tiers.serve(f"r{i}", keys(f"a{i}-", 32), TraceId(f"a{i}"))
    host = tiers.manager.host.pool
    assert sum(not host.is_evictable(key) for key in list(host.keys())) == 16
    assert tiers.manager.num_refused == 0
    assert tiers.disk.num_jobs == 1
    held = set(host.ready)
    for _ in range(9):
        tiers.step(1000.0)
    assert tiers.nvme is not None
    assert held <= set(tiers.nvme.here), "it is written when the disk has time"
    assert not tiers.disk.num_jobs


def test_a_turn_larger_than_the_disks_queue_is_written_while_the_engine_is_idle() -> None:
    tiers = Tiers(64, nvme=256)
    tiers.disk.limits = Limits(max_queued_write_bytes=staging_bytes(64 * CHUNK_BYTES, CHUNK_BYTES))
    tiers.serve("r", keys("a", 40), A)
    assert tiers.disk.queued_write_bytes == 16 * CHUNK_BYTES
    for _ in range(3):  # nothing steps; somebody asks for figures
        tiers.clock.advance(1.0)
        figures = snapshot._tiers(tiers.manager)
    assert figures["nvme_used_bytes"] == figures["nvme_write_bytes"] == 40 * CHUNK_BYTES


def test_all_that_finds_no_place_is_counted(monkeypatch: Any) -> None:
    monkeypatch.setattr("impala_vllm.adapters.vllm.tiers.demotions.WRITE_BYTES", 3 * CHUNK_BYTES)
    tiers = Tiers(16, nvme=4)
    tiers.serve("r", keys("a", 11), A)
    assert tiers.manager.stats()["nvme_unplaced_bytes"] == 7 * CHUNK_BYTES
    other = Tiers(16, nvme=16)
    other.disk.is_full = True
    other.serve("r", keys("a", 11), A)
    assert other.manager.stats()["nvme_unplaced_bytes"] == 0.0, "there is room: the disk takes nothing"


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


def test_a_disk_that_takes_no_writes_does_not_empty_the_tier(monkeypatch: Any) -> None:
    monkeypatch.setattr("impala_vllm.adapters.vllm.tiers.demotions.WRITE_BYTES", 2 * CHUNK_BYTES)
    tiers = Tiers(64, nvme=8)
    tiers.serve("r", keys("a", 8), A)
    tiers.step(1.0)
    tiers.manager.forget(A)  # worth nothing: whoever comes may have its room
    tiers.disk.is_full = True
    for i in range(5):
        tiers.serve(f"t{i}", keys(f"c{i}-", 8), TraceId(f"c{i}"))
    assert tiers.nvme is not None
    assert len(tiers.nvme.pool) == 6
    tiers.disk.is_full = False
    tiers.serve("u", keys("d", 4), TraceId("d"))
    tiers.step(1.0)
    assert all(key in tiers.nvme.here for key in keys("d", 4))
    tiers.check_nothing_moves()


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


# Without policy.

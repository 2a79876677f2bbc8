"""What goes on to NVMe and when: as it is stored, at a turn's end, or when the disk has time."""

from typing import Any

import pytest

pytest.importorskip("vllm")

from impala_vllm.adapters.vllm import snapshot
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

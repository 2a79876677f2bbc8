"""The manager as vLLM's connector drives it: whatever comes in whatever order, no slot ever has two owners.

Bytes are real and are looked at after every step; time is the test's own.
"""

import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import (
    Medium,
)

from impala_vllm.core.planner import Below
from tests.adapters.vllm.tiers.moving_bytes import CHUNK_BYTES
from tests.adapters.vllm.tiers.whole import TOKENS, A, B, C, Tiers, keys, names, on_nvme, promote


def test_what_was_stored_is_loaded_by_the_next_turn() -> None:
    tiers = Tiers(8)
    tiers.serve("r", keys("a", 3), A)
    follower = tiers.arrive("s", keys("a", 5), A)
    assert tiers.lookup(follower) == 3
    job = tiers.load(follower, 3)
    assert not tiers.manager.host.pool.is_evictable(keys("a", 1)[0])
    tiers.complete(follower, job)
    tiers.finish(follower)
    tiers.check_nothing_moves()
    assert (tiers.manager.num_stored, tiers.manager.loads.num_chunks) == (3, 3)


def test_a_turn_makes_room_from_what_is_worth_least_and_keeps_its_own() -> None:
    tiers = full_host()
    tiers.idle.update(C, 2, 2 * TOKENS, True, tiers.clock(), is_running=True)
    tiers.serve("t", keys("c", 2), C)
    assert names(tiers.manager.host.pool.keys()) == ["a0000", "a0001", "a0002", "b0000", "c0000", "c0001"]
    assert tiers.manager.host.num_evicted == 2


def test_with_nothing_below_host_a_turn_takes_no_room_from_what_is_worth_as_much() -> None:
    tiers = full_host()  # nothing is known of C
    tiers.serve("t", keys("c", 2), C)
    assert names(tiers.manager.host.pool.keys()) == names(keys("a", 3) + keys("b", 3))
    assert (tiers.manager.host.num_evicted, tiers.manager.num_refused) == (0, 2)
    tiers.manager.forget(B)
    tiers.serve("u", keys("c", 2), C)
    assert names(tiers.manager.host.pool.keys()) == ["a0000", "a0001", "a0002", "b0000", "c0000", "c0001"]


def test_with_nvme_below_a_turn_takes_host_room_whatever_it_is_worth() -> None:
    tiers = full_host(nvme=8)
    tiers.serve("t", keys("c", 2), C)
    assert tiers.manager.num_refused == 0


@pytest.mark.parametrize("nvme", [0, 8])
def test_what_is_no_traces_takes_no_room_from_any_trace(nvme: int) -> None:
    tiers = full_host(nvme)
    tiers.step(1.0)  # whatever goes on to NVMe has gone
    tiers.serve("t", keys("c", 2))
    assert names(tiers.manager.host.pool.keys()) == names(keys("a", 3) + keys("b", 3))
    assert (tiers.manager.host.num_evicted, tiers.manager.num_refused) == (0, 2)
    tiers.manager.forget(B)
    tiers.serve("u", keys("c", 2))
    assert names(tiers.manager.host.pool.keys()) == ["a0000", "a0001", "a0002", "b0000", "c0000", "c0001"]


def test_without_traces_any_more_whoever_comes_has_room() -> None:
    tiers = full_host()
    running = tiers.arrive("q", keys("d", 1), B)
    tiers.manager.forget_all()
    tiers.serve("t", keys("c", 6))
    assert names(tiers.manager.host.pool.keys()) == names(keys("c", 6))
    tiers.finish(running)
    tiers.check_nothing_moves()


@pytest.mark.parametrize("policy", [True, False])
def test_a_request_that_is_left_out_finds_nothing_and_leaves_nothing(policy: bool) -> None:
    tiers = Tiers(8, nvme=8, policy=policy)
    tiers.serve("r", keys("a", 3), A)
    tiers.step(1.0)
    tiers.manager.leave_out("s")
    request = tiers.arrive("s", keys("a", 5), A)
    assert tiers.lookup(request) == 0
    assert tiers.compute(request, 5) is None
    tiers.finish(request)
    assert names(tiers.manager.host.pool.keys()) == names(keys("a", 3))
    assert names(tiers.manager.turns.keys_of(A)) == (names(keys("a", 3)) if policy else [])
    tiers.check_nothing_moves()
    assert not tiers.manager.turns.left_out
    assert tiers.lookup(tiers.arrive("t", keys("a", 5), A)) == 3, "others are served as ever"


def full_host(nvme: int = 0) -> Tiers:
    """Six chunks: three of A, and three of B, which is not expected back."""
    tiers = Tiers(6, nvme)
    tiers.serve("r", keys("a", 3), A)
    tiers.serve("s", keys("b", 3), B)
    tiers.step(1.0)
    tiers.gaps.finish(A, tiers.clock())
    for trace_id in (A, B):
        tiers.idle.update(trace_id, 0, 3 * TOKENS, False, tiers.clock(), Below(3 * TOKENS))
    return tiers


def test_a_prompt_longer_than_host_keeps_its_root_and_is_refused_its_tail() -> None:
    for trace_id in (A, None):
        tiers = Tiers(4)
        request = tiers.arrive("r", keys("a", 7), trace_id)
        for _ in range(7):
            tiers.compute(request, 1)
            tiers.settle(request)
        tiers.finish(request)
        assert names(tiers.manager.host.pool.keys()) == names(keys("a", 4))
        assert tiers.manager.num_refused == 3
        tiers.check_nothing_moves()


def test_a_chunk_that_another_request_still_stores_is_not_promised_and_not_stored_twice() -> None:
    tiers = Tiers(8)
    first, second = tiers.arrive("r", keys("a", 2), A), tiers.arrive("s", keys("a", 2), B)
    job = tiers.compute(first, 2)
    assert job is not None
    assert tiers.lookup(second) == 0
    assert tiers.compute(second, 2) is None
    tiers.complete(first, job)
    assert tiers.manager.host.pool.is_ready(keys("a", 1)[0])


def test_a_trace_that_is_forgotten_while_its_turn_runs_leaves_nothing_behind() -> None:
    tiers = Tiers(8, nvme=8)
    request = tiers.arrive("r", keys("a", 4), A)
    tiers.compute(request, 2)
    tiers.settle(request)
    tiers.manager.forget(A)
    tiers.compute(request, 2)
    tiers.finish(request)
    tiers.settle(request)
    tiers.step(1.0)
    tiers.check_nothing_moves()
    assert not tiers.manager.turns.keys_of(A)
    assert tiers.manager.host.chains._chains == {}
    assert tiers.nvme is not None
    assert tiers.nvme.chains._chains == {}


def test_an_abort_during_a_load_keeps_the_slots_until_the_load_is_over() -> None:
    tiers = Tiers(2)
    tiers.serve("r", keys("a", 2), A)
    request = tiers.arrive("s", keys("a", 2), A)
    job = tiers.load(request, 2)
    tiers.finish(request)
    other = tiers.arrive("t", keys("b", 2), B)
    assert tiers.compute(other, 2) is None
    tiers.complete(request, job)
    assert tiers.manager.turns.get("s") is None
    tiers.finish(other)
    tiers.check_nothing_moves()


def test_a_reset_forgets_everything_and_gives_back_every_slot_when_its_bytes_have_stopped() -> None:
    tiers = Tiers(4, nvme=4)
    prompt = on_nvme(tiers, "a", 2)
    tiers.serve("s", keys("b", 2), B)  # being written
    request = tiers.arrive("r", prompt, A)
    promote(tiers, request)  # being read
    tiers.reset()
    tiers.check()
    assert tiers.lookup(request) == 0
    assert (len(tiers.manager.host.pool), tiers.manager.host.pool.num_free) == (0, 0)
    tiers.finish(request)
    tiers.step(1.0)
    tiers.check_nothing_moves()
    assert (tiers.manager.host.pool.num_free, tiers.manager.turns.changed_traces.keys()) == (4, {A, B})


def test_a_second_reset_while_the_first_ones_bytes_still_move_loses_no_slot() -> None:
    tiers = Tiers(4, nvme=4)
    tiers.disk._seconds = 10.0
    tiers.serve("r", keys("a", 2), A)  # being written
    tiers.reset()
    tiers.serve("s", keys("a", 2), A, writes=False)  # the same chunks in other slots, which nobody reads
    tiers.reset()
    tiers.check()
    tiers.step(10.0)
    tiers.check_nothing_moves()
    assert tiers.manager.host.pool.num_free == 4


def test_the_speed_of_a_link_is_that_of_all_workers_together() -> None:
    tiers = Tiers(8)
    tiers.serve("r", keys("a", 4), A)
    request = tiers.arrive("s", keys("a", 4), A)
    job = tiers.load(request, 4)
    assert tiers.planner.host.queued_bytes == 4 * CHUNK_BYTES
    tiers.manager.loads.took(0.25)  # half of the workers are done in this step, half in the next
    tiers.manager.loads.took(0.25)
    tiers.complete(request, job)
    tiers.manager.loads.took(0.0)
    assert tiers.planner.host.bytes_per_s == pytest.approx(4 * CHUNK_BYTES / 0.5)
    assert tiers.planner.host.queued_bytes == 0


def test_what_comes_and_goes_is_told_as_events_promotions_too() -> None:
    tiers = Tiers(4, nvme=8, events=True)
    prompt = on_nvme(tiers, "a", 2)
    request = tiers.arrive("r", prompt, A)
    promote(tiers, request)
    tiers.step(1.0)
    told = [(event.medium, event.removed, names(sorted(event.keys))) for event in tiers.manager.take_events()]
    assert told == [(Medium.CPU, removed, names(prompt)) for removed in (False, True, False)]
    assert list(tiers.manager.take_events()) == []


# After a restart.


def test_when_policy_is_gone_nothing_is_any_traces() -> None:
    tiers = Tiers(6, nvme=6)
    tiers.serve("r", keys("a", 3), A)
    request = tiers.arrive("s", keys("b", 3), B)
    tiers.compute(request, 3)
    tiers.manager.detach()
    tiers.has_policy = False
    tiers.finish(request)
    tiers.settle(request)
    tiers.step(1.0)
    tiers.serve("t", keys("c", 3))
    assert sorted(names(tiers.manager.host.pool.keys())) == names([*keys("b", 3), *keys("c", 3)])
    assert not tiers.manager.turns.changed_traces
    tiers.step(1.0)
    tiers.check_nothing_moves()


# Everything at once.

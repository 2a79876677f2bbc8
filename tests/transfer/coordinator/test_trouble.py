"""A disk that fails, loses or keeps silent opens the breaker, and a probe closes it."""

import math

import pytest


def test_an_error_run_opens_the_breaker_and_gives_the_rest_back(make):
    rig = make(max_in_flight=1, max_consecutive_errors=3)
    rig.written(range(10))
    rig.disk.fails = lambda op: True
    rig.submit(1, False, range(10))
    rig.submit(2, False, range(10))
    rig.submit(3, True, range(20, 25))
    rig.finish(1, 2, 3)
    assert len(rig.results[1].failed_keys) == 3
    assert len(rig.results[1].untried_keys) == 7
    assert len(rig.results[2].untried_keys) == 10
    assert len(rig.results[3].untried_keys) == 5
    assert rig.coordinator.breaker.is_open
    assert rig.slab.record(9) is not None, "what was not tried is still there"


def test_an_open_breaker_gives_jobs_back_at_once(make):
    rig = make(max_in_flight=1, max_consecutive_errors=1)
    rig.disk.fails = lambda op: True
    rig.submit(1, True, [1])
    rig.finish(1)
    before = rig.clock.now
    rig.submit(2, False, [1])
    rig.submit(3, True, [1])
    rig.step(0.0)
    assert set(rig.results) == {1, 2, 3}
    assert rig.results[2].cancelled
    assert rig.clock.now == before


def test_a_disk_that_works_again_is_found_by_a_probe(make):
    rig = make(max_in_flight=1, max_consecutive_errors=1)
    rig.written(range(2))
    rig.disk.fails = lambda op: True
    rig.submit(1, True, [5])
    rig.finish(1)
    opened_s = rig.clock.now
    rig.disk.started.clear()
    rig.run_until(opened_s + 100.0)
    assert [now - opened_s for now, _ in rig.disk.started] == pytest.approx([30.0, 90.0], abs=0.1)
    rig.disk.fails = lambda op: False
    rig.until(lambda: not rig.coordinator.breaker.is_open)
    assert rig.clock.now - opened_s == pytest.approx(210.0, abs=0.1)
    assert all(op.offset_bytes == rig.slab.probe_offset_bytes for _, op in rig.disk.started)
    rig.submit(2, False, range(2))
    rig.finish(2)
    assert len(rig.results[2].done_keys) == 2


@pytest.mark.parametrize("dies", [False, True])
def test_a_disk_works_again_only_where_it_is_used_again(make, dies: bool, caplog: pytest.LogCaptureFixture):
    rig = make(max_consecutive_errors=1)
    rig.disk.fails = lambda op: True
    rig.submit(1, True, [5])
    rig.finish(1)
    rig.disk.fails = lambda op: False
    rig.disk.started.clear()
    rig.until(lambda: bool(rig.disk.started))
    if dies:
        rig.coordinator.breaker.kill()  # the probe is at the disk
    with caplog.at_level("INFO"):
        rig.run_until(rig.clock.now + 10.0)
    assert rig.coordinator.breaker.is_open == dies
    assert ("the disk works again" in caplog.text) != dies


def test_a_disk_that_loses_what_is_written_does_not_pass_the_probe(make):
    rig = make(max_consecutive_errors=1)
    rig.disk.fails = lambda op: True
    rig.submit(1, True, [5])
    rig.finish(1)
    rig.disk.fails = lambda op: False
    move = rig.disk._move
    rig.disk._move = lambda op: None if op.is_write else move(op)
    rig.run_until(rig.clock.now + 40.0)
    assert rig.disk.started[-1][1].offset_bytes == rig.slab.probe_offset_bytes
    assert rig.coordinator.breaker.is_open


def test_a_read_without_an_answer_opens_the_breaker_when_it_is_stuck(make):
    rig = make(stuck_s=5.0)
    rig.written(range(20))
    rig.disk.seconds = lambda op: math.inf
    before = rig.clock.now
    rig.submit(1, False, range(20))
    rig.submit(2, False, range(20))
    rig.run_until(before + 4.99)
    assert not rig.coordinator.breaker.is_open
    rig.run_until(before + 5.0)
    rig.step(0.0)
    assert rig.coordinator.breaker.is_open
    assert rig.results[2].cancelled
    assert 1 not in rig.results, "its buffers are still in use"


def test_a_slow_read_comes_back_after_the_breaker_opened_and_then_a_probe_closes_it(make):
    rig = make(stuck_s=5.0)
    rig.written(range(2))
    rig.disk.seconds = lambda op: 100.0
    rig.submit(1, False, range(2))
    before = rig.clock.now
    rig.until(lambda: rig.coordinator.breaker.is_open)
    rig.disk.seconds = lambda op: 0.001
    rig.finish(1)
    assert rig.clock.now - before == pytest.approx(100.0)
    assert len(rig.results[1].done_keys) == 2, "late, and still right"
    assert rig.coordinator.breaker.is_open, "no probe while the disk owes an answer"
    rig.step()
    rig.step()
    assert not rig.coordinator.breaker.is_open


def test_a_slow_write_opens_nothing(make):
    rig = make(stuck_s=5.0)
    rig.disk.seconds = lambda op: 100.0
    rig.submit(1, True, range(2))
    rig.finish(1)
    assert len(rig.results[1].done_keys) == 2
    assert not rig.coordinator.breaker.is_open

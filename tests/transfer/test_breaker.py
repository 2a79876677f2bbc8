"""When the breaker opens, how long it stays open, and what closes it."""

import math

from impala_vllm.transfer.breaker import Breaker


def make() -> Breaker:
    return Breaker(max_consecutive_errors=3, cooldown_s=30.0, max_cooldown_s=600.0)


def test_it_opens_at_the_last_of_consecutive_errors():
    breaker = make()
    assert [breaker.fail(0.0) for _ in range(3)] == [False, False, True]
    assert breaker.is_open


def test_a_success_starts_the_count_anew():
    breaker = make()
    for _ in range(10):
        breaker.fail(0.0)
        breaker.fail(0.0)
        breaker.succeed()
    assert not breaker.is_open


def test_a_probe_is_due_after_the_cool_down_and_only_once():
    breaker = make()
    assert breaker.probe_in_s(0.0) == math.inf
    breaker.trip(100.0)
    assert breaker.probe_in_s(110.0) == 20.0
    assert breaker.probe_in_s(200.0) == 0.0
    breaker.start_probe()
    assert breaker.probe_in_s(1000.0) == math.inf


def test_each_probe_that_fails_doubles_the_wait_up_to_the_bound():
    breaker, now, waits = make(), 0.0, []
    breaker.trip(now)
    for _ in range(7):
        waits.append(breaker.probe_in_s(now))
        now += waits[-1]
        breaker.start_probe()
        breaker.end_probe(False, now)
    assert waits == [30.0, 60.0, 120.0, 240.0, 480.0, 600.0, 600.0]
    assert breaker.is_open


def test_a_probe_that_works_closes_it():
    breaker = make()
    breaker.trip(0.0)
    breaker.start_probe()
    breaker.end_probe(True, 30.0)
    assert not breaker.is_open
    assert [breaker.fail(31.0) for _ in range(3)] == [False, False, True]


def test_opening_soon_after_closing_waits_twice_as_long():
    breaker = make()
    breaker.trip(0.0)
    breaker.end_probe(True, 30.0)
    breaker.trip(40.0)
    assert breaker.probe_in_s(40.0) == 60.0
    breaker.end_probe(True, 100.0)
    breaker.trip(1000.0)
    assert breaker.probe_in_s(1000.0) == 30.0


def test_opening_an_open_one_changes_nothing():
    breaker = make()
    assert breaker.trip(0.0)
    assert not breaker.trip(10.0)
    assert breaker.probe_in_s(10.0) == 20.0


def test_a_dead_one_stays_open():
    breaker = make()
    breaker.trip(0.0)
    breaker.start_probe()
    breaker.kill()
    breaker.end_probe(True, 30.0)
    assert breaker.is_open
    assert breaker.is_dead
    assert breaker.probe_in_s(1e9) == math.inf

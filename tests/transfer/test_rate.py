"""The cap lets through what it says, and the meter measures the disk, not the load."""

import math
import random

import pytest

from impala_vllm.transfer.rate import Meter, TokenBucket


@pytest.mark.parametrize("op_bytes", [1_000, 50_000, 3_000_000])
def test_over_a_long_time_a_cap_holds_for_small_and_large_ops(op_bytes: int):
    bucket, now, moved = TokenBucket(1e6, 0.0), 0.0, 0
    while now < 60.0:
        wait_s = bucket.ready_in_s(now)
        if wait_s > 0.0:
            now += wait_s
            continue
        bucket.take(op_bytes, now)
        moved += op_bytes
    assert moved <= 60.0 * 1e6 + 0.1 * 1e6 + op_bytes
    assert moved >= 60.0 * 1e6 - op_bytes


def test_a_pause_saves_up_a_burst_and_no_more():
    bucket = TokenBucket(1e6, 0.0, burst_s=0.1)
    started = 0
    while bucket.ready_in_s(3600.0) <= 0.0:
        bucket.take(10_000, 3600.0)
        started += 1
    assert started == 10


def test_without_a_cap_everything_may_start():
    bucket = TokenBucket(None, 0.0)
    for _ in range(1000):
        assert bucket.ready_in_s(0.0) == 0.0
        bucket.take(1 << 30, 0.0)


def test_a_cap_of_nothing_lets_nothing_through():
    assert TokenBucket(0.0, 0.0).ready_in_s(5.0) == math.inf


def test_waiting_as_long_as_said_is_enough():
    draw = random.Random(1)
    bucket, now = TokenBucket(123_456.7, 0.0), 0.0
    for _ in range(10_000):
        now += bucket.ready_in_s(now)
        assert bucket.ready_in_s(now) <= 0.0
        bucket.take(draw.randrange(1, 100_000), now)


def test_a_clock_that_stands_or_goes_back_earns_nothing():
    bucket = TokenBucket(1e6, 10.0)
    bucket.take(200_000, 10.0)
    assert bucket.ready_in_s(10.0) == pytest.approx(0.1, rel=1e-3)
    assert bucket.ready_in_s(5.0) == pytest.approx(0.1, rel=1e-3)
    assert bucket.ready_in_s(10.0) == pytest.approx(0.1, rel=1e-3)


def test_a_meter_knows_nothing_until_something_moved():
    meter = Meter()
    meter.start(0.0)
    meter.finish(0, 1.0)
    assert meter.bytes_per_s is None


def test_idle_time_does_not_slow_a_meter():
    meter, now = Meter(), 0.0
    for _ in range(100):
        meter.start(now)
        meter.finish(1_000_000, now + 0.01)
        now += 5.0
    assert meter.bytes_per_s == pytest.approx(100e6)


def test_ops_side_by_side_count_their_time_once():
    meter, now = Meter(), 0.0
    for _ in range(100):
        for _ in range(4):
            meter.start(now)
        now += 0.01
        for _ in range(4):
            meter.finish(1_000_000, now)
    assert meter.bytes_per_s == pytest.approx(400e6, rel=0.05)


def test_a_meter_follows_a_disk_that_slows_down():
    meter, now = Meter(), 0.0
    for seconds in [0.01] * 100 + [0.1] * 100:
        meter.start(now)
        now += seconds
        meter.finish(1_000_000, now)
    assert meter.bytes_per_s == pytest.approx(10e6, rel=0.01)

"""Virtual time: in order, at equal times in the order asked, never backwards."""

import pytest

from impala_vllm.sim.loop import PATIENCE_S, Loop


def test_calls_come_in_order_of_time_and_at_equal_times_in_the_order_asked():
    loop, seen = Loop(), list[tuple[float, str]]()
    for when_s, name in ((2.0, "b"), (1.0, "a"), (2.0, "c")):
        loop.at(when_s, lambda name=name: seen.append((loop.now, name)))
    loop.run()
    assert seen == [(1.0, "a"), (2.0, "b"), (2.0, "c")]


def test_a_time_that_has_passed_is_now():
    loop, seen = Loop(), list[float]()
    loop.at(5.0, lambda: loop.at(1.0, lambda: seen.append(loop.now)))
    loop.run()
    assert seen == [5.0]


def test_whoever_lets_nothing_happen_for_ever_is_named():
    loop = Loop()

    def nap():
        loop.again(loop.now + 1.0, nap, "Miser")

    loop.at(2 * PATIENCE_S, lambda: None)  # until then something is still to come
    nap()
    with pytest.raises(AssertionError, match="Miser lets nobody start"):
        loop.run()
    assert 3 * PATIENCE_S < loop.now <= 3 * PATIENCE_S + 2.0

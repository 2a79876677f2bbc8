"""Interleaving and intervals."""

import pytest

from impala_vllm.replay.comparison import order, ratio


def test_every_second_repetition_runs_backwards() -> None:
    assert order(["a", "b"], 3) == ["a", "b", "b", "a", "a", "b"]


def test_the_ratio_is_the_median_of_pairs() -> None:
    r = ratio([10.0, 20.0, 10.0], [11.0, 20.0, 12.0])
    assert (r.num_pairs, r.p50) == (3, pytest.approx(1.1))


def test_the_interval_of_few_pairs_is_their_range_and_says_how_sure_it_is() -> None:
    r = ratio([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (r.low, r.high) == (1.0, 5.0)
    assert r.coverage == pytest.approx(0.9375)


def test_more_pairs_leave_the_outliers_out() -> None:
    r = ratio([1.0] * 8, [0.5, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 9.0])
    assert (r.low, r.high) == (1.0, 1.5)
    assert r.coverage >= 0.9

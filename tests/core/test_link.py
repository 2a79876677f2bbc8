"""How fast a link is: what was seen, in seconds a byte; how long a queue takes."""

import pytest

from impala_vllm.core.link import Link, LinkConfig


def test_before_anything_was_seen_the_prior_holds() -> None:
    link = Link(LinkConfig(100.0))
    assert link.seconds(250) == 2.5
    assert link.wait_s() == 0.0


def test_the_first_transfer_replaces_the_prior_and_the_next_ones_are_averaged() -> None:
    link = Link(LinkConfig(1e9))
    link.observe(100, 1.0)
    assert link.bytes_per_s == pytest.approx(100.0)
    link.observe(100, 3.0)  # a second and three seconds for a hundred bytes: two on average
    assert link.seconds(100) == pytest.approx(2.0)
    link.observe(50, 2.5)
    assert link.seconds(100) == pytest.approx((1.0 + 3.0 + 5.0) / 3)


def test_a_link_that_changes_is_followed_within_its_memory() -> None:
    link = Link(LinkConfig(1e9, memory=20.0))
    for _ in range(200):
        link.observe(1000, 1.0)
    for _ in range(20):
        link.observe(1000, 2.0)
    assert link.seconds(1000) == pytest.approx(2.0 - (1.0 - 1.0 / 20.0) ** 20)


@pytest.mark.parametrize(("num_bytes", "seconds"), [(0, 1.0), (100, 0.0), (-5, 1.0), (100, -1.0)])
def test_what_says_nothing_is_not_counted(num_bytes: int, seconds: float) -> None:
    link = Link(LinkConfig(100.0))
    link.observe(num_bytes, seconds)
    assert link.bytes_per_s == 100.0
    link.observe(100, 4.0)
    assert link.bytes_per_s == pytest.approx(25.0)


def test_what_was_asked_for_is_waited_for_at_the_links_speed() -> None:
    link = Link(LinkConfig(100.0))
    link.queued_bytes = 300
    assert link.wait_s() == 3.0
    link.observe(100, 2.0)
    assert link.wait_s() == pytest.approx(6.0)

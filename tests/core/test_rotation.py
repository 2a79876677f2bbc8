"""Who of a queue is judged again."""

from impala_vllm.core.cost import StepCost
from impala_vllm.core.rotation import MAX_JUDGED, Rotation


def test_a_short_queue_is_judged_as_a_whole():
    rotation = Rotation(StepCost())
    ranked = list(range(MAX_JUDGED))
    rotation.due(ranked, len(ranked))  # the first price is a new one
    assert rotation.due(ranked, len(ranked)) is None


def test_of_a_long_queue_the_first_are_always_judged_and_everybody_in_turn():
    rotation, ranked = Rotation(StepCost()), list(range(31))
    assert rotation.due(ranked, len(ranked)) is None
    seen: set[int] = set()
    for _ in range(len(ranked)):
        due = rotation.due(ranked, len(ranked))
        assert due is not None
        assert len(due) <= MAX_JUDGED
        assert set(ranked[: MAX_JUDGED // 2]) <= set(due)
        seen.update(due)
    assert seen == set(ranked)


def test_another_price_is_everybodys():
    cost = StepCost()
    rotation, ranked = Rotation(cost), list(range(31))
    rotation.due(ranked, len(ranked))
    assert rotation.due(ranked, len(ranked)) is not None
    cost.observe(10.0, 1000, 0.0)
    assert rotation.due(ranked, len(ranked)) is None
    assert rotation.due(ranked, len(ranked)) is not None

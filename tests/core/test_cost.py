"""Step costs: the fit finds the engine's own rates."""

import random

from impala_vllm.core.cost import CostConfig, StepCost


def test_the_prior_stands_until_a_step_is_seen() -> None:
    assert StepCost(CostConfig(prefill_s_per_token=1e-3)).prefill_s(100) == 0.1


def test_it_learns_what_late_tokens_cost() -> None:
    rng, cost = random.Random(1), StepCost()
    for _ in range(300):
        cost.observe(0.012, 0, 0.0)
        tokens, context = rng.randrange(64, 2048), rng.randrange(0, 8000)
        cost.observe(0.012 + tokens * (2e-4 + 1e-7 * context), tokens, float(context))
    assert abs(cost.decode_s - 0.012) < 1e-3
    expected = 1000 * (2e-4 + 1e-7 * 4500)
    assert abs(cost.prefill_s(5000, 4000) - expected) < 0.1 * expected


def test_more_in_cache_is_never_dearer() -> None:
    rng, cost = random.Random(2), StepCost()
    for _ in range(100):
        cost.observe(rng.random(), rng.randrange(1, 4000), rng.random() * 1e4)
    times = [cost.prefill_s(4000, cached) for cached in range(0, 4001, 100)]
    assert times == sorted(times, reverse=True)
    assert times[-1] == 0.0


def test_steps_of_one_size_do_not_divide_by_zero() -> None:
    cost = StepCost()
    for _ in range(50):
        cost.observe(0.5, 1000, 0.0)
    assert abs(cost.prefill_s(1000) - 0.5) < 0.1

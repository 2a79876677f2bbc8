"""What of a step's time is learned as the cost of what."""

from types import SimpleNamespace
from typing import Any

import pytest

from impala_vllm.adapters.vllm.step_timer import StepTimer


class Cost:
    """Takes down what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, int]] = []

    def observe(self, step_s: float, prefill_tokens: int, mean_context: float) -> None:
        self.seen.append((pytest.approx(step_s), prefill_tokens))


def step(drafts: int = 0, **tokens: int) -> Any:
    """The plan of a step over requests that have begun; each with so many drafts among its tokens."""
    return SimpleNamespace(
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_spec_decode_tokens={name: [-1] * drafts for name in tokens if drafts},
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(req_ids=list(tokens), num_computed_tokens=[1000] * len(tokens)),
    )


def timed(*steps: tuple[str, float, Any]) -> list[tuple[Any, int]]:
    cost = Cost()
    timer = StepTimer(cost)  # type: ignore[arg-type]
    for verb, now, output in steps:
        getattr(timer, verb)(output, now)
    return cost.seen


def test_drafts_to_verify_are_no_prompt() -> None:
    decode, prefill = step(drafts=3, a=4, b=4), step(a=1, c=500)
    assert timed(
        ("planned", 0.0, decode), ("ended", 0.1, decode), ("planned", 0.1, prefill), ("ended", 0.4, prefill)
    ) == [(0.1, 0), (0.3, 500)]


def test_an_empty_step_between_two_that_overlap_takes_nothing_from_them() -> None:
    first, empty, second = step(a=100), step(), step(a=200)
    assert timed(
        ("planned", 0.0, first),
        ("planned", 0.0, empty),
        ("ended", 1.0, first),
        ("planned", 1.0, second),
        ("ended", 1.0, empty),
        ("ended", 3.0, second),
    ) == [(1.0, 100), (2.0, 200)]

"""With how few replicas a policy does what stock does with all of them: what could be saved."""

from collections.abc import Callable
from dataclasses import replace

from impala_vllm.sim.client import Served
from impala_vllm.sim.measures import Measures
from impala_vllm.sim.policies import Kind
from impala_vllm.sim.question import Question
from impala_vllm.sim.simulation import Outcome, run

AS_MANY = 0.99
"""Of the tasks an hour count as just as many."""


def fewest(
    question: Question,
    kind: Kind,
    stock: Measures,
    with_all: Outcome,
    on_try: Callable[[int], Callable[[Served], None] | None] = lambda _: None,
) -> int | None:
    """The least number of replicas, alike, with which tasks wait no longer than under stock and as many are done.

    The same tasks come at the same times, or as many are live. None: not even with all. Runs log2(replicas) times, and
    asks `on_try` each time for what is told of turns.
    """
    if not _does_as_well(with_all.measures, stock):
        return None
    low, high = 1, question.setup.num_replicas
    while low < high:
        middle = (low + high) // 2
        setup = replace(question.setup, num_replicas=middle)
        found = run(question.workload, setup, kind, on_try(middle)).measures
        if _does_as_well(found, stock):
            high = middle
        else:
            low = middle + 1
    return high


def _does_as_well(found: Measures, stock: Measures) -> bool:
    is_as_quick = found.stall_mean_s <= stock.stall_mean_s
    return is_as_quick and found.tasks_per_hour >= AS_MANY * stock.tasks_per_hour

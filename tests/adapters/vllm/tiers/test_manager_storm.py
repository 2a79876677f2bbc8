"""No order of events gives a slot two owners or loses one."""

import random
from typing import Any

import pytest

pytest.importorskip("vllm")


from impala_vllm.core.types import TraceId
from tests.adapters.vllm.tiers.whole import Request, Tiers, keys, promote


class Storm:
    """Random verbs, in any order in which the connector could issue them."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.tiers = Tiers(rng.choice([3, 8, 20]), rng.choice([0, 5, 40]), policy=rng.random() < 0.8)
        self.tiers.disk.fails = lambda key: rng.random() < 0.05
        self.tiers.disk._seconds = rng.choice([0.02, 0.1, 3.0])
        self.histories = {TraceId(f"t{i}"): keys(f"stem{i % 2}-", rng.randrange(3)) for i in range(5)}
        self._num = 0

    def run(self, num_ops: int) -> None:
        verbs = {
            self.come: 6,
            self.begin: 12,
            self.compute: 14,
            self.complete: 16,
            self.end: 5,
            self.preempt: 2,
            self.trouble: 1,
            self.forget: 1,
            self.reset: 1,
            self.lose_policy: 0.1,
        }
        for _ in range(num_ops):
            self.rng.choices([*verbs], [*verbs.values()])[0]()
            if self.rng.random() < 0.5:
                self.tiers.step(self.rng.choice([0.0, 0.02, 0.2, 1.5]))
            self.tiers.check()
        self.tiers.disk.is_open = self.tiers.disk.is_full = False
        for request in list(self.tiers.requests.values()):
            if not request.is_over:
                self.tiers.finish(request)
            self.tiers.settle(request)
        for _ in range(2):  # what ends may be written
            self.tiers.step(3.0)
        self.tiers.check_nothing_moves()

    def come(self) -> None:
        trace_id = self.rng.choice([*self.histories])
        history = self.histories[trace_id]
        self._num += 1
        if self.rng.random() < 0.15:
            history = history[: self.rng.randrange(len(history) + 1)]  # compacted, or an older point
        self.histories[trace_id] = history = history + keys(f"turn{self._num}-", self.rng.randrange(1, 5))
        told = {"stem": self.rng.randrange(3), "writes": self.rng.random() < 0.7}
        self.tiers.arrive(f"r{self._num}", history, trace_id if self.rng.random() < 0.9 else None, **told)

    def begin(self) -> None:
        request = self._some(lambda r: not r.jobs and not r.num_computed)
        if request is None:
            return
        nvme = self.tiers.nvme
        if nvme is not None and self.tiers.has_policy and self.rng.random() < 0.7:
            promote(self.tiers, request, self.rng.sample([*self.histories], self.rng.randrange(3)))
        found = self.tiers.lookup(request)
        if found:
            self.tiers.load(request, found)
        elif found == 0:
            self.tiers.compute(request, self.rng.randrange(1, 4))

    def compute(self) -> None:
        request = self._some(lambda r: r.num_computed and not any(not job.is_store for job in r.jobs.values()))
        if request is not None:
            self.tiers.compute(request, self.rng.randrange(1, 4))

    def complete(self) -> None:
        moving = [(r, number) for r in self.tiers.requests.values() for number in r.jobs]
        if moving:
            self.tiers.complete(*self.rng.choice(moving))

    def end(self) -> None:
        """Finished, or aborted: a load may be under way."""
        request = self._some(lambda r: True)
        if request is not None:
            loads = any(not job.is_store for job in request.jobs.values())
            output = keys(f"out{request.req_id}-", self.rng.randrange(2)) if not loads else []
            self.tiers.finish(request, output, writes=self.rng.random() < 0.7)

    def preempt(self) -> None:
        request = self._some(lambda r: r.num_computed and not any(not job.is_store for job in r.jobs.values()))
        if request is not None:
            for number in list(request.jobs):
                self.tiers.complete(request, number)
            request.num_computed = 0

    def trouble(self) -> None:
        self.tiers.disk.is_open = self.rng.random() < 0.3
        self.tiers.disk.is_full = self.rng.random() < 0.3

    def forget(self) -> None:
        if self.tiers.has_policy:
            self.tiers.manager.forget(self.rng.choice([*self.histories]))

    def reset(self) -> None:
        self.tiers.reset()
        for request in self.tiers.requests.values():
            request.num_computed = 0

    def lose_policy(self) -> None:
        self.tiers.manager.detach()
        self.tiers.has_policy = False
        for request in self.tiers.requests.values():
            request.trace_id = None

    def _some(self, may: Any) -> Request | None:
        found = [request for request in self.tiers.requests.values() if not request.is_over and may(request)]
        return self.rng.choice(found) if found else None


@pytest.mark.parametrize("seed", range(40))
def test_no_order_of_events_gives_a_slot_two_owners_or_loses_one(seed: int) -> None:
    Storm(seed).run(150)

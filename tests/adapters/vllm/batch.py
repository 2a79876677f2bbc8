"""Requests for a scheduler without a model: agents with tools, on a clock of ours, or one request at a time."""

import random
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

BOTH = pytest.mark.parametrize("asynchronous", [False, True])
STEP_S = 0.1


class Batch:
    """Agents with tools that take their time, on a scheduler whose clock is ours."""

    def __init__(self, scheduler: Any, num_agents: int, num_turns: int, seed: int, num_blocks: int) -> None:
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(32, sha256)
        self._rng = random.Random(seed)
        self._scheduler = scheduler
        self._num_blocks = num_blocks
        self._turns_left = dict.fromkeys(range(num_agents), num_turns)
        self._history = {a: [7] * 64 + [100 + a] * self._rng.randrange(10, 120) for a in range(num_agents)}
        self._due = {a: self._rng.random() for a in range(num_agents)}
        self._open: dict[str, int] = {}
        self.now = 0.0
        self.served: list[str] = []
        self.waits: dict[str, float] = {}
        scheduler.observer.clock = lambda: self.now

    def run(self, max_steps: int = 4000, abort_share: float = 0.0) -> None:
        """Until every agent is done; fails where that takes more steps than any sane schedule."""
        for _ in range(max_steps):
            self._arrive()
            if not self._open and not any(self._turns_left.values()):
                return
            if self._open and self._rng.random() < abort_share:
                self._end(self._rng.choice(sorted(self._open)), aborted=True)
            if self._scheduler.has_requests():
                self._step()
            self.now += STEP_S
            self.check()
        raise AssertionError(f"{len(self._open)} requests still open")

    def check(self) -> None:
        queue = self._scheduler.enforcer.free
        queue.check_invariants()
        assert len(self._scheduler.waiting) + len(self._scheduler.running) >= len(self._open)

    def _arrive(self) -> None:
        for agent, due in list(self._due.items()):
            if due <= self.now and self._turns_left[agent]:
                del self._due[agent]
                name = f"a{agent}t{self._turns_left[agent]}"
                params = SamplingParams(max_tokens=self._rng.randrange(1, 12), ignore_eos=True, temperature=0.0)
                request = Request(name, self._history[agent], params, None, 0, self.now, block_hasher=self._hasher)
                self._open[name] = agent
                self._scheduler.add_request(request)

    def _step(self) -> None:
        scheduled = self._scheduler.schedule()
        ids = list(scheduled.num_scheduled_tokens)
        sampled = [[] if self._scheduler.requests[i].is_prefill_chunk else [50] for i in ids]
        for request_id in ids:
            self.waits.setdefault(request_id, self.now)
        output = ModelRunnerOutput(
            req_ids=ids, req_id_to_index={i: n for n, i in enumerate(ids)}, sampled_token_ids=sampled
        )
        tokens = {i: self._scheduler.requests[i].all_token_ids for i in ids}
        outputs = self._scheduler.update_from_output(scheduled, output)
        for answer in (o for client in outputs.values() for o in client.outputs if o.finished):
            agent = self._open[answer.request_id]
            self._history[agent] = [*list(tokens[answer.request_id]), *[200 + agent] * self._rng.randrange(4, 30)]
            self._end(answer.request_id)

    def _end(self, request_id: str, aborted: bool = False) -> None:
        agent = self._open.pop(request_id)
        self.served.append(request_id)
        self._turns_left[agent] -= 1
        self._due[agent] = self.now + self._rng.lognormvariate(0.0, 1.0)
        if aborted:
            self._scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)


def send(scheduler: Any, name: str, prompt: list[int], **fields: Any) -> Request:
    """Queue a request that ends with its first token."""
    init_none_hash(sha256)
    params = SamplingParams(max_tokens=9, temperature=0.0, stop_token_ids=[50])
    hasher = get_request_block_hasher(32, sha256)
    request = Request(name, prompt, params, None, 0, 0.0, block_hasher=hasher, **fields)
    scheduler.add_request(request)
    return request


def complete(scheduler: Any, scheduled: Any) -> None:
    """What a model gives back for a step that `schedule` planned."""
    ids = list(scheduled.num_scheduled_tokens)
    output = ModelRunnerOutput(
        req_ids=ids, req_id_to_index={i: n for n, i in enumerate(ids)}, sampled_token_ids=[[50] for _ in ids]
    )
    scheduler.update_from_output(scheduled, output)

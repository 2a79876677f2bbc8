"""What deciding costs a step: rank, admission and retention at 256 running, 200 waiting and 2,000 known traces.

Prompts have 118k tokens (3,688 blocks of 32). Bar: 200 us a step. The scheduler is vLLM's own, in a state that no
model was needed for; each round is one plan, with a turn that came and one that went since the last.
"""

import gc
from itertools import count
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
from vllm.v1.request import Request, RequestStatus

from impala_vllm.core.types import TraceId
from impala_vllm.plugin import register
from impala_vllm.replay import tiny_model
from tests.adapters.vllm.schedulers import build

NUM_RUNNING, NUM_WAITING, NUM_TRACES = 256, 200, 2_000
PROMPT_BLOCKS = 3_688
TOKENS = [7] * (32 * PROMPT_BLOCKS)
IDLE_BLOCKS = 40
NUM_ROUNDS = 300

_numbers = count()


class Server:
    """A scheduler with turns that run, wait and pause; only what a plan looks at is filled in."""

    def __init__(self, model: str, num_waiting: int) -> None:
        num_blocks = NUM_TRACES * IDLE_BLOCKS + 1_000
        self.scheduler: Any = build(model, mode="enforce", num_blocks=num_blocks)
        self.policy = self.scheduler.enforcer
        self.now = 100.0
        self._coming = [self._request() for _ in range(NUM_ROUNDS)]
        for i in range(400):  # a workload with gaps of 20 s, so that idle KV is kept
            self.policy.gaps.finish(TraceId(f"seen{i}"), 0.0)
            self.policy.gaps.resume(TraceId(f"seen{i}"), 20.0)
        self._pool = self.scheduler.kv_cache_manager.block_pool
        for i in range(NUM_TRACES - NUM_RUNNING - num_waiting):
            self._pause(TraceId(f"idle{i}"))
        for i in range(NUM_RUNNING):
            request = self._request()
            self.policy.arrive(request, TraceId(f"running{i}"), self.now)
            request.status = RequestStatus.RUNNING
            request.num_computed_tokens = request.num_prompt_tokens
            self.scheduler.running.append(request)
        self._pool.get_new_blocks(self.policy.free.num_unclaimed - 10)  # HBM is short
        for i in range(num_waiting):
            self._arrive(TraceId(f"waiting{i}"), self._request())

    def turnover(self) -> None:
        """A turn comes, another goes: what a plan has to take in."""
        self.now += 0.03
        self._arrive(TraceId(f"new{next(_numbers)}"), self._coming.pop())
        gone = next(iter(self.scheduler.waiting))
        self.scheduler.waiting.remove_request(gone)
        self.policy.finish(gone, self.now)

    def plan(self) -> None:
        self.policy.plan(self.now)

    def _arrive(self, trace_id: TraceId, request: Request) -> None:
        self.policy.arrive(request, trace_id, self.now)
        self.scheduler.waiting.add_request(request)

    def _pause(self, trace_id: TraceId) -> None:
        request = self._request()
        self.policy.arrive(request, trace_id, self.now - 5.0)
        blocks = self._pool.get_new_blocks(IDLE_BLOCKS)
        for block, digest in zip(blocks, request.block_hashes, strict=False):
            block.set_block_hash(make_block_hash_with_group_id(digest, 0))
        self.policy.free.claim = trace_id
        self._pool.free_blocks(reversed(blocks))
        self.policy.free.claim = None
        self.policy.finish(request, self.now - next(_numbers) % 50 * 0.1)

    @staticmethod
    def _request() -> Request:
        params = SamplingParams(max_tokens=1_000)
        request = Request(f"r{next(_numbers)}", [7] * 32, params, None)
        number = next(_numbers)
        request.block_hashes = [(number * PROMPT_BLOCKS + i).to_bytes(32, "big") for i in range(PROMPT_BLOCKS)]
        request._all_token_ids = TOKENS
        request.num_prompt_tokens = len(TOKENS)
        return request


@pytest.fixture(scope="module")
def model() -> str:
    register()
    return str(tiny_model.build("1m"))


@pytest.mark.parametrize("num_waiting", [0, 20, NUM_WAITING])
def test_a_plan_with_turns_waiting(benchmark, model, num_waiting):
    server = Server(model, num_waiting)
    gc.collect()
    gc.freeze()  # as vLLM's engine does

    def prepare() -> tuple[tuple[()], dict[str, Any]]:
        if num_waiting:
            server.turnover()
        else:
            server.now += 0.03
        return (), {}

    benchmark.pedantic(server.plan, setup=prepare, rounds=NUM_ROUNDS)
    assert num_waiting == 0 or server.policy.gate.num_held > 0

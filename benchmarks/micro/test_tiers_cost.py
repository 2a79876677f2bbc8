"""What tiers cost the engine loop: turns of 118k tokens (3,688 chunks of 32) with 2,000 traces known.

Bar: 5 ms for a turn that resumes, all verbs together. A first turn is bounded by its chunks: each is stored and
written once, spread over the steps of its prefill. Bytes do not move; everything that decides is the code that ships.
"""

import gc
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, ScheduleEndContext, make_offload_key

from benchmarks.virtual.tiers import VirtualStore
from impala_vllm.adapters.vllm.tiers.manager import TierManager
from impala_vllm.adapters.vllm.tiers.nvme import NvmeTier
from impala_vllm.adapters.vllm.tiers.policy import TierPolicy
from impala_vllm.core.admission import Admission, Asking
from impala_vllm.core.cost import CostConfig, StepCost
from impala_vllm.core.gaps import GapForecast
from impala_vllm.core.idle import IdleKv
from impala_vllm.core.planner import Below, PlannerConfig
from impala_vllm.core.rank import Waiting
from impala_vllm.core.retention import Retention
from impala_vllm.core.traces import Trace
from impala_vllm.core.types import Namespace, Outcome, RequestId, TraceId

TOKENS, CHUNK_BYTES, ROW_BYTES = 32, 4 << 20, 4096
"""A chunk counts as four megabytes, and its row in host has a page."""
NUM_CHUNKS, NUM_OUTPUT, STEP_CHUNKS = 3_688, 12, 64
HOST_CHUNKS, NVME_CHUNKS = 24_000, 80_000
NUM_TRACES, NUM_WAITING = 2_000, 200
NUM_ROUNDS = 30
END_OF_STEP = ScheduleEndContext((), ())

_numbers = count()


class Request:
    """What policy and connector look at."""

    def __init__(self, trace: int, num_chunks: int) -> None:
        self.request_id = f"r{next(_numbers)}"
        self.lora_request = None
        self.trace_id = TraceId(f"t{trace}")
        self.block_hashes = [((trace << 32) + i).to_bytes(32, "big") for i in range(num_chunks)]
        self.num_tokens = num_chunks * TOKENS + 1
        self.context = ReqContext(self.request_id)
        self.keys = [make_offload_key(digest, 0) for digest in self.block_hashes]
        for index, key in enumerate(self.keys, start=1):
            self.context.set_offload_key_position(key, index * TOKENS)

    def next_turn(self, num_chunks: int) -> "Request":
        """The same prompt and so many chunks more."""
        return Request(int(self.trace_id[1:]), len(self.keys) + num_chunks)


class Server:
    """Tiers that are full, and the traces that filled them."""

    def __init__(self) -> None:
        self.now = 100.0
        memory = memoryview(np.zeros(HOST_CHUNKS * ROW_BYTES, dtype=np.uint8))
        store: Any = VirtualStore(None, None, lambda: self.now)
        self.nvme = NvmeTier(store, NVME_CHUNKS, {}, lambda n: memory[n * ROW_BYTES : (n + 1) * ROW_BYTES], CHUNK_BYTES)
        self.manager = TierManager(HOST_CHUNKS, CHUNK_BYTES, TOKENS, self.nvme, lambda: self.now)
        gaps, cost = GapForecast(), StepCost(CostConfig(prefill_s_per_token=1e-4))
        self.gaps, self.idle = gaps, None
        scheduler: Any = SimpleNamespace(
            running=[],
            kv_cache_manager=SimpleNamespace(block_pool=SimpleNamespace(get_num_free_blocks=lambda: NUM_CHUNKS)),
            block_size=TOKENS,
            hash_block_size=TOKENS,
            kv_cache_config=SimpleNamespace(prefix_cacheable_group_ids=[0]),
            vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(world_size=1), lora_config=None),
        )
        self.policy = TierPolicy(scheduler, self.manager, cost, PlannerConfig())
        idle = IdleKv(gaps, Admission(cost, 300.0), Retention(cost), self.policy.planner)
        self.manager.attach(idle, self.policy.planner)
        few = HOST_CHUNKS // NUM_TRACES
        for number in range(NUM_TRACES):
            request = Request(number, few)
            self.compute(request)
            gaps.finish(request.trace_id, self.now - number % 50 * 0.1)
            idle.update(request.trace_id, 0, few * TOKENS, False, self.now, Below(few * TOKENS, 0, few * TOKENS))
        self.manager.turns.changed_traces.clear()
        gc.collect()
        gc.freeze()  # as vLLM's engine does

    def arrive(self, request: Any) -> None:
        trace = Trace(request.trace_id, Namespace(), RequestId(request.request_id), self.now)
        trace.num_turns = 2
        self.policy.arrive(request, trace, 0)
        self.manager.on_new_request(request.context)

    def finish(self, request: Any) -> None:
        trace = Trace(request.trace_id, Namespace(), RequestId(request.request_id), self.now)
        trace.num_turns = 2
        self.policy.finish(request, trace, 0, Outcome.TOOL_CALL)
        self.manager.on_request_finished(request.context)
        self.manager.on_schedule_end(END_OF_STEP)

    def compute(self, request: Request, start: int = 0) -> None:
        """A turn of which everything from `start` on is computed, stored and written."""
        if not start:
            self.arrive(request)
        for first in range(start, len(request.keys), STEP_CHUNKS):
            self.store(request, request.keys[first : first + STEP_CHUNKS])
        self.finish(request)

    def store(self, request: Request, keys: list[OffloadKey]) -> None:
        output = self.manager.prepare_store(keys, request.context)
        assert output is not None
        assert len(output.keys_to_store) == len(keys)
        self.manager.complete_store(set(keys), request.context)
        self.manager.on_schedule_end(END_OF_STEP)

    def resume(self, request: Request, num_held: int) -> None:
        """A turn that finds its chunks in host and loads them all; a few are new."""
        manager, held = self.manager, request.keys[:num_held]
        self.arrive(request)
        assert all(manager.lookup(key, request.context) is LookupResult.HIT for key in held)
        manager.prepare_load(held, request.context)
        manager.complete_load(set(held), request.context)
        self.compute(request, num_held)

    def go_on(self, request: Request, num_held: int) -> None:
        """A turn that finds its chunks in HBM: the connector offers all of them anew; a few are new."""
        self.arrive(request)
        output = self.manager.prepare_store(request.keys, request.context)
        assert output is not None
        assert len(output.keys_to_store) == len(request.keys) - num_held
        self.manager.complete_store(set(output.keys_to_store), request.context)
        self.finish(request)


@pytest.fixture(scope="module")
def server() -> Server:
    return Server()


def rounds(benchmark: Any, server: Server, verb: Callable[..., None], setup: Callable[[], tuple[Any, ...]]) -> None:
    def prepare() -> tuple[tuple[Any, ...], dict[str, Any]]:
        server.now += 0.03
        return setup(), {}

    benchmark.pedantic(verb, setup=prepare, rounds=NUM_ROUNDS, warmup_rounds=1)


def test_a_turn_that_resumes(benchmark: Any, server: Server) -> None:
    turns = [Request(NUM_TRACES + next(_numbers), NUM_CHUNKS)]
    server.compute(turns[0])

    def setup() -> tuple[Request, int]:
        turns.append(turns[-1].next_turn(NUM_OUTPUT))
        return turns[-1], len(turns[-2].keys)

    rounds(benchmark, server, server.resume, setup)


def test_a_turn_that_goes_on_in_hbm(benchmark: Any, server: Server) -> None:
    turns = [Request(NUM_TRACES + next(_numbers), NUM_CHUNKS)]
    server.compute(turns[0])

    def setup() -> tuple[Request, int]:
        turns.append(turns[-1].next_turn(NUM_OUTPUT))
        return turns[-1], len(turns[-2].keys)

    rounds(benchmark, server, server.go_on, setup)


def test_a_first_turn(benchmark: Any, server: Server) -> None:
    rounds(benchmark, server, server.compute, lambda: (Request(NUM_TRACES + next(_numbers), NUM_CHUNKS),))


def test_a_chunk_for_which_there_is_no_room(benchmark: Any, server: Server) -> None:
    request = Request(NUM_TRACES + next(_numbers), 2 * NUM_ROUNDS)
    server.arrive(request)
    keys = iter(request.keys)
    rounds(benchmark, server, server.store, lambda: (request, [next(keys)]))


def test_a_step_with_turns_waiting(benchmark: Any, server: Server) -> None:
    asks = []
    for _ in range(NUM_WAITING):
        request: Any = Request(NUM_TRACES + next(_numbers), NUM_CHUNKS)
        server.arrive(request)
        reach_tokens, load_s = server.policy.reach(request, 0)
        name, length = RequestId(request.request_id), request.num_tokens
        turn = Waiting(name, request.trace_id, server.now, length, reach_tokens, 10, load_s=load_s)
        asks.append(Asking(turn, NUM_CHUNKS, 0))
    rounds(benchmark, server, lambda: server.policy.load(asks, server.now), tuple)

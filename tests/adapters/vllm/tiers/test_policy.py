"""What policy tells the tiers of a request: the names of its chunks, and whether they may outlive the server."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import OffloadKey, ReqContext, make_offload_key

from impala_vllm.adapters.vllm.tiers.manager import TierManager
from impala_vllm.adapters.vllm.tiers.policy import TierPolicy
from impala_vllm.core.cost import StepCost
from impala_vllm.core.planner import PlannerConfig
from impala_vllm.core.traces import Trace
from impala_vllm.core.types import Namespace, Outcome, RequestId, TraceId

BLOCK_TOKENS, CHUNK_TOKENS, GROUP = 16, 32, 3


@dataclass
class Request:
    """What policy looks at."""

    num_blocks: int
    request_id: str = "r"
    lora_request: Any = None
    block_hashes: list[bytes] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * BLOCK_TOKENS

    def __post_init__(self) -> None:
        self.block_hashes = [bytes([i]) * 32 for i in range(self.num_blocks)]

    def chunks(self) -> list[OffloadKey]:
        """A chunk is named by the last of its two blocks."""
        return [make_offload_key(digest, GROUP) for digest in self.block_hashes[1::2]]


def build(lora_config: Any = None) -> TierPolicy:
    scheduler: Any = SimpleNamespace(
        block_size=BLOCK_TOKENS,
        hash_block_size=BLOCK_TOKENS,
        kv_cache_config=SimpleNamespace(prefix_cacheable_group_ids=[GROUP]),
        vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(world_size=1), lora_config=lora_config),
    )
    manager = TierManager(8, 4096, CHUNK_TOKENS)
    return TierPolicy(scheduler, manager, StepCost(), PlannerConfig())


def trace(num_turns: int = 2) -> Trace:
    found = Trace(TraceId("t"), Namespace(), RequestId("r"), 0.0)
    found.num_turns = num_turns
    return found


def told(policy: TierPolicy, request: Any) -> Any:
    """The manager's view of the request's turn, after its arrival."""
    policy.arrive(request, trace(), 0)
    return policy.manager.turns.get("r")


@pytest.mark.parametrize("num_blocks", [0, 1, 2, 3, 8, 9])
def test_full_chunks_alone_have_a_name(num_blocks: int) -> None:
    request = Request(num_blocks)
    assert told(build(), request).keys == request.chunks()


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 1), (1, 2), (4, 4), (4, 5), (5, 6), (3, 9)])
def test_an_output_adds_names_to_those_of_the_prompt(before: int, after: int) -> None:
    policy = build()
    request: Any = Request(before)
    turn = told(policy, request)
    request.block_hashes = Request(after).block_hashes
    policy.finish(request, trace(), 0, Outcome.TOOL_CALL, 0.0)
    assert turn.keys == Request(after).chunks()


def test_what_an_adapter_computed_does_not_outlive_the_server() -> None:
    policy = build()
    assert told(policy, Request(4)).writes
    policy.finish(Request(4), trace(), 0, Outcome.TOOL_CALL, 0.0)  # type: ignore[arg-type]
    policy = build()
    request: Any = Request(4, lora_request="an adapter")
    turn = told(policy, request)
    assert not turn.writes
    policy.finish(request, trace(), 0, Outcome.TOOL_CALL, 0.0)
    assert not turn.writes


def test_a_request_that_is_left_out_has_no_chunks() -> None:
    policy, request = build(), Request(8)
    policy.manager.leave_out("r")
    turn = told(policy, request)
    reach = policy.reach(request, 2)  # type: ignore[arg-type]
    assert (turn.keys, turn.trace_id, turn.writes, reach.tokens) == ((), None, False, 2 * BLOCK_TOKENS)
    policy.finish(request, trace(), 0, Outcome.TOOL_CALL, 0.0)  # type: ignore[arg-type]
    assert not policy.manager.turns.keys_of(TraceId("t"))


def test_what_tiers_hold_of_a_trace_is_known_as_chunks_come_and_go() -> None:
    policy, request = build(), Request(12)
    turn, chunks = told(policy, request), request.chunks()
    manager, context = policy.manager, ReqContext("r")
    for place, key in enumerate(chunks, start=1):
        context.set_offload_key_position(key, place * CHUNK_TOKENS)

    def in_host() -> int:
        return policy.below(turn.trace_id).host_tokens // CHUNK_TOKENS

    assert in_host() == 0
    for first, end in ((0, 2), (2, 5)):
        manager.prepare_store(chunks[first:end], context)
        manager.complete_store(set(chunks[first:end]), context)
        assert in_host() == end
    manager.host.evict(chunks[3:4])
    assert in_host() == 3
    manager.prepare_store(chunks[3:4], context)
    manager.complete_store({chunks[3]}, context)
    assert in_host() == 5
    manager.reset_cache()
    assert in_host() == 0


@pytest.mark.parametrize("owner", [None, TraceId("other")])
def test_what_went_is_counted_no_more_though_it_was_not_the_traces_own(owner: TraceId | None) -> None:
    policy, request = build(), Request(8)
    turn, chunks = told(policy, request), request.chunks()
    host = policy.manager.host
    if owner is not None:
        host.chains.use(owner, chunks[:2])
    host.pool.reserve(chunks)
    host.fill(chunks[:2], owner)
    if owner is None:
        host.chains.use(TraceId("t"), chunks, 2)  # a shared stem
    host.fill(chunks[2:], turn.trace_id)
    assert policy.below(turn.trace_id).host_tokens == 4 * CHUNK_TOKENS
    host.evict(chunks[:1])
    assert policy.below(turn.trace_id).host_tokens == 0


def test_without_policy_everything_is_written_but_where_there_are_adapters() -> None:
    assert build().manager.writes_unasked
    assert not build(lora_config="some").manager.writes_unasked

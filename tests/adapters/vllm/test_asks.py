"""Who is judged, and when: what waits for a grammar, what a step skipped, what passes its bound."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request, RequestStatus

from impala_vllm.adapters.vllm.asks import _searchable_group
from tests.adapters.vllm.schedulers import build


class Queue:
    """A scheduler with requests that wait, and the names of who may run, best first."""

    def __init__(self, model: str, num_blocks: int = 400) -> None:
        init_none_hash(sha256)
        self.now = 0.0
        self.scheduler: Any = build(model, mode="enforce", num_blocks=num_blocks)
        self.scheduler.observer.clock = lambda: self.now
        self.asks = self.scheduler.enforcer.asks

    def send(self, name: str, num_tokens: int = 64, **params: Any) -> Any:
        sampling = SamplingParams(max_tokens=4, ignore_eos=True, **params)
        token = 10 + len(self.scheduler.requests)
        hasher = get_request_block_hasher(32, sha256)
        request = Request(name, [token] * num_tokens, sampling, None, 0, self.now, block_hasher=hasher)
        self.scheduler.add_request(request)
        return request

    def ask_for_json(self, name: str) -> Any:
        return self.send(name, num_tokens=400, structured_outputs=StructuredOutputsParams(json_object=True))

    def plan(self) -> list[str]:
        self.scheduler.enforcer.plan(self.now)
        return [request.request_id for request in self.scheduler.waiting._admitted]

    def judged(self) -> list[str]:
        """Who is judged in the next plan."""
        names: list[str] = []
        judge = self.asks._judge
        self.asks._judge = lambda request, now: (names.append(request.request_id), judge(request, now))[1]
        self.plan()
        self.asks._judge = judge
        return names


def test_a_turn_whose_grammar_is_compiled_is_ranked_like_any_other(model):
    queue = Queue(model)
    for number in range(6):
        queue.now = float(number)
        request = queue.ask_for_json(f"json{number}")
        assert request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        request.structured_output_request.grammar = SimpleNamespace()
    queue.send("short", num_tokens=33)
    assert queue.plan() == ["short", *(f"json{number}" for number in range(6))]


def test_who_waits_for_a_grammar_stands_in_nobodys_way_and_is_shown_to_vllm_in_order_of_arrival(model):
    queue = Queue(model)
    first, second = queue.ask_for_json("first"), queue.ask_for_json("second")
    first.structured_output_request.grammar = ValueError("no such grammar")
    assert queue.plan() == ["first", "second"]
    queue.ask_for_json("third")
    assert queue.plan() == ["first", "second", "third"]
    second.structured_output_request.grammar = SimpleNamespace()
    assert queue.plan() == ["first", "third", "second"]


def test_whom_a_step_skipped_keeps_its_place_without_being_judged_again(model):
    queue = Queue(model)
    requests = [queue.send(f"r{i}", num_tokens=64 + i) for i in range(40)]
    before = queue.plan()
    for request in requests[20:]:  # as vLLM does with a turn whose adapter finds no place
        queue.scheduler.waiting.remove_request(request)
    queue.scheduler.waiting.prepend_requests(requests[20:])
    assert len(queue.judged()) <= 4
    assert queue.plan() == before


def test_past_its_bound_a_turn_is_judged_alone_and_goes_first(model):
    queue = Queue(model)
    for number in range(40):
        queue.now = float(number)
        queue.send(f"r{number}", num_tokens=500 - number)
    queue.plan()
    queue.now = queue.scheduler.enforcer.admission._hold_s + 0.5
    assert "r0" in queue.judged()
    assert queue.plan()[0] == "r0"
    queue.now += 1.0
    assert len(queue.judged()) <= 5
    assert queue.plan()[:2] == ["r0", "r1"]


def test_a_request_that_must_not_read_the_cache_has_nothing_in_reach(model):
    queue = Queue(model)
    reading, computing = queue.send("reading"), queue.send("computing")
    computing.skip_reading_prefix_cache = True
    queue.asks._cached = lambda request, index: True
    queue.plan()
    asks = {ask.turn.request_id: ask.turn.reach_tokens for ask in queue.asks._order.asks}
    assert asks == {reading.request_id: 32, computing.request_id: 0}


def test_only_a_group_that_keeps_whole_chains_tells_how_far_a_prompt_is_cached():
    layer: dict[str, Any] = {"num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    whole, small = FullAttentionSpec(block_size=32, **layer), FullAttentionSpec(block_size=16, **layer)
    window = SlidingWindowSpec(block_size=32, sliding_window=64, **layer)

    def group(*specs: Any, block_size: int = 32, hash_block_size: int = 32) -> int | None:
        config = SimpleNamespace(kv_cache_groups=[KVCacheGroupSpec(["layer"], spec) for spec in specs])
        scheduler: Any = SimpleNamespace(kv_cache_config=config, block_size=block_size, hash_block_size=hash_block_size)
        return _searchable_group(scheduler)

    assert group(whole) == 0
    assert group(window, whole) == 1
    assert group(window) is None
    assert group(window, small) is None
    assert group(whole, hash_block_size=16) is None

"""Storms of all weathers: preemptions, retries, hang-ups, bursts, small tables, and an emptied cache or a fault."""

import random
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from tests.adapters.vllm.batch import BOTH
from tests.adapters.vllm.storm import HOLD_S, Ask, Storm, blocks, build


def longest_wait_of_stock(model: str, asynchronous: bool, num_blocks: int, asks: list[Ask]) -> float:
    storm = Storm(build(model, asynchronous, num_blocks, mode="observe"), asks)
    storm.run()
    return max(storm.waits.values())


def outputs_longer_than_expected(num: int) -> list[Ask]:
    """Short answers teach policy to expect short ones; then come long ones that push each other out."""
    short = [Ask(f"short {i}", 0.1 * i, blocks(2, i), 2) for i in range(60)]
    return short + [Ask(f"long {i}", 8.0 + 0.1 * i, blocks(2 + i % 5, 100 + i), 150 + i) for i in range(num)]


@BOTH
def test_turns_that_push_each_other_out_are_all_served(model, asynchronous):
    storm = Storm(build(model, asynchronous, 22), outputs_longer_than_expected(20))
    storm.run()
    assert storm.num_preemptions > 10


@BOTH
@pytest.mark.parametrize("runner", [1, 2])
def test_the_longest_wait_told_is_the_longest_until_a_turn_first_ran(model, asynchronous, runner):
    scheduler = build(model, asynchronous, 22)
    scheduler.use_v2_model_runner = runner == 2  # it calls resumed turns new
    storm = Storm(scheduler, outputs_longer_than_expected(20))
    storm.run()
    assert scheduler.enforcer.longest_wait_s == pytest.approx(max(storm.waits.values()), abs=0.01)


@BOTH
def test_a_preempted_turn_is_not_overtaken_by_those_that_keep_coming(model, asynchronous):
    newcomers = [Ask(f"new {i}", 9.0 + 0.3 * i, blocks(1, 200 + i), 3) for i in range(200)]
    storm = Storm(build(model, asynchronous, 22), outputs_longer_than_expected(8) + newcomers)
    storm.run()
    assert storm.num_preemptions > 3


@BOTH
def test_turns_sent_again_while_the_first_still_waits_are_all_answered(model, asynchronous):
    rng = random.Random(3)
    asks = []
    for agent in range(20):
        at_s, prompt = rng.random() * 3, blocks(rng.randrange(4, 10), agent)
        for attempt in range(5):
            later_s = at_s + attempt * 0.3
            hang_up_s = later_s + 0.4 if attempt % 2 else None
            asks.append(Ask(f"{agent} try {attempt}", later_s, prompt, 8, 0, hang_up_s, num_more=2))
    storm = Storm(build(model, asynchronous, 30), asks)
    storm.run()
    assert storm.num_hung_up
    assert storm.longest_held


@BOTH
def test_everybody_hanging_up_at_once_leaves_a_server_like_new(model, asynchronous):
    asks = [Ask(f"gone {i}", 0.02 * i, blocks(2 + i % 8, i), 20, 0, 4.0) for i in range(120)]
    asks += [Ask(f"later {i}", 6.0, blocks(2 + i % 8, i), 5) for i in range(30)]
    storm = Storm(build(model, asynchronous), asks)
    storm.run()
    assert storm.num_hung_up > 80
    assert {f"later {i}" for i in range(30)} <= storm.waits.keys()


@BOTH
def test_a_hundred_arrivals_at_once_wait_at_most_the_bound_longer_than_in_stock(model, asynchronous):
    rng = random.Random(4)
    asks = [Ask(f"{i}", float(i // 100) * 3, blocks(rng.randrange(2, 12), i), rng.randrange(2, 20)) for i in range(200)]
    storm = Storm(build(model, asynchronous), asks)
    storm.run()
    assert max(storm.waits.values()) > HOLD_S, "nobody came near the bound: this test would show nothing"
    assert max(storm.waits.values()) <= HOLD_S + longest_wait_of_stock(model, asynchronous, 40, asks)


@BOTH
def test_a_burst_after_an_hour_of_silence_is_served_like_the_first(model, asynchronous):
    agents = [Ask(f"agent {i}", 0.0, blocks(2 + i % 6, i), 5, num_more=1) for i in range(30)]
    burst = [Ask(f"after {i}", 3600.0, blocks(2 + i % 6, i + 15 * (i % 2)), 5) for i in range(100)]
    scheduler = build(model, asynchronous)
    storm = Storm(scheduler, agents + burst)
    storm.run()
    assert max(storm.waits.values()) <= HOLD_S + longest_wait_of_stock(model, asynchronous, 40, agents + burst)


@BOTH
def test_a_table_for_few_traces_leaves_no_trace_behind_in_policy(model, asynchronous):
    asks = [Ask(f"{i}", 0.05 * i, blocks(2 + i % 5, i), 5, num_more=2) for i in range(60)]
    storm = Storm(build(model, asynchronous, max_traces=4), asks)
    storm.run()


@BOTH
@pytest.mark.parametrize("seed", range(2))
def test_all_weathers_at_once_are_survived(model, asynchronous, seed):
    rng = random.Random(seed)
    asks = []
    for i in range(100):
        at_s = rng.choice([0.0, 5.0, 30.0]) if rng.random() < 0.5 else rng.random() * 60
        prompt = blocks(rng.randrange(1, 8), i, rng.randrange(2, 29))
        hang_up_s = at_s + rng.random() * 10 if rng.random() < 0.2 else None
        long = rng.random() < 0.15
        ask = Ask(
            f"{i}",
            at_s,
            prompt,
            rng.randrange(100, 180) if long else rng.randrange(1, 15),
            rng.choice([0, 0, 0, 1, -1]),
        )
        asks.append(replace(ask, hang_up_s=hang_up_s, num_more=0 if long else rng.randrange(4)))
        if rng.random() < 0.2:
            asks.append(replace(ask, name=f"{i} again", at_s=at_s + rng.random() * 2))
    storm = Storm(build(model, asynchronous, 24, max_num_seqs=8 + 200 * seed), asks)
    storm.run()
    assert storm.num_preemptions


def test_an_emptied_prefix_cache_is_nobodys(model):
    scheduler = build(model)
    Storm(scheduler, [Ask(f"{i}", 0.1 * i, blocks(4, i)) for i in range(5)]).run()
    assert scheduler.enforcer.free.claims()
    assert scheduler.reset_prefix_cache()
    assert not scheduler.enforcer.free.claims()
    scheduler.enforcer.free.check_invariants()


def test_what_was_in_an_emptied_prefix_cache_is_work_again(model):
    scheduler = build(model)
    reach: dict[str, int] = {}
    ask = scheduler.enforcer.asks._ask

    def spy(request, *seen):
        found = ask(request, *seen)
        reach[request.request_id] = found.turn.reach_tokens
        return found

    scheduler.enforcer.asks._ask = spy
    Storm(scheduler, [Ask("first", 0.0, blocks(4, 1))]).run()
    assert scheduler.reset_prefix_cache()
    Storm(scheduler, [Ask("cold", 0.0, blocks(4, 1)), Ask("warm", 5.0, blocks(4, 1))]).run()
    assert reach == {"first": 0, "cold": 0, "warm": 3 * 32}


def _falls_back(model: str, **sizes: Any) -> list[str]:
    """The order in which vLLM finds what waits when policy has failed: `late` was urgent, `preempted` ran once."""
    scheduler = build(model, **sizes)
    for name, priority in (("early", 1), ("late", 0)):
        params = SamplingParams(max_tokens=4)
        scheduler.waiting.add_request(Request(name, [7] * 40, params, None, arrival_time=1.0, priority=priority))
    preempted = Request("preempted", [7] * 40, SamplingParams(max_tokens=4), None, arrival_time=0.0, priority=1)
    preempted.status = RequestStatus.PREEMPTED
    scheduler.waiting.prepend_request(preempted)
    scheduler.enforcer.retire()
    return [scheduler.waiting.pop_request().request_id for _ in range(3)]


def test_after_a_fault_a_preempted_turn_is_first_as_in_stock(model):
    assert _falls_back(model) == ["preempted", "early", "late"]


def test_after_a_fault_vllms_own_priority_policy_is_back(model):
    assert _falls_back(model, scheduling_policy="priority") == ["late", "preempted", "early"]

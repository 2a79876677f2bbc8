"""Storms over policy in vLLM's own scheduler, without a model and with a clock of ours.

Every step is judged: the free queue adds up, nobody preempted or past the bound is overtaken. At the end of
each storm everybody has an answer, every block is free again and policy remembers no request.
"""

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from impala_vllm.adapters.vllm import choice
from impala_vllm.config import load
from impala_vllm.plugin import register
from impala_vllm.replay import tiny_model
from tests.adapters.vllm.batch import BOTH, STEP_S, Batch
from tests.adapters.vllm.schedulers import from_config

HOLD_S = 20.0
TOKEN_S = 2e-4
"""What a token of a step takes, beside STEP_S for the step."""


@pytest.fixture(scope="module")
def model():
    register()
    return str(tiny_model.build("1m"))


def build(model: str, asynchronous: bool = False, num_blocks: int = 40, mode: str = "enforce", **sizes: Any) -> Any:
    """A scheduler whose bound on waiting is short. `sizes` are engine arguments, `max_traces` excepted."""
    flags = {"mode": mode, "rank.hold_s": HOLD_S, "identity.max_traces": sizes.pop("max_traces", 4096)}
    settings = load(None, {name: ("test", value) for name, value in flags.items()})
    scheduler_cls = choice.Choice.of(settings)
    args = EngineArgs(model=model, max_model_len=512, block_size=32, scheduler_cls=scheduler_cls, **sizes)
    config = args.create_engine_config()
    config.scheduler_config.async_scheduling = asynchronous
    return from_config(config, num_blocks)


@dataclass(frozen=True)
class Ask:
    """One request: when it comes, what it is, when its client loses patience."""

    name: str
    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int = 4
    priority: int = 0
    hang_up_s: float | None = None
    num_more: int = 0
    """Turns of the same agent after this one, each a second after the answer."""


class Storm(Batch):
    """Requests that come when the test says, on a pipeline as deep as the engine's."""

    def __init__(self, scheduler: Any, asks: Iterable[Ask]) -> None:
        super().__init__(scheduler, 0, 0, 0, scheduler.kv_cache_config.num_blocks)
        self._asks = {ask.name: ask for ask in asks}
        self._coming = deque(sorted(self._asks.values(), key=lambda a: a.at_s))
        self._turns_left: dict[Any, int] = dict.fromkeys(self._asks, 1)
        self._arrived: dict[str, float] = {}
        self._flight: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self._depth = int(scheduler.vllm_config.scheduler_config.async_scheduling)
        self._enforces = getattr(scheduler, "enforcer", None) is not None
        self.num_preemptions = 0
        self.num_hung_up = 0
        self.longest_held = 0

    def run(self, max_steps: int = 20000, abort_share: float = 0.0) -> None:
        super().run(max_steps, abort_share)
        while self._flight or self._scheduler.has_requests():
            self._step()
        self._settled()

    def check(self) -> None:
        if self._enforces:
            super().check()
            self.longest_held = max(self.longest_held, self._scheduler.enforcer.gate.num_held)

    def _arrive(self) -> None:
        if not self._open and self._coming:
            self.now = max(self.now, self._coming[0].at_s)  # nothing to do until then
        self._lose_patience()
        while self._coming and self._coming[0].at_s <= self.now:
            ask = self._coming.popleft()
            params = SamplingParams(max_tokens=ask.max_tokens, ignore_eos=True, temperature=0.0)
            request = Request(
                ask.name,
                list(ask.prompt),
                params,
                None,
                arrival_time=self.now,
                block_hasher=self._hasher,
                priority=ask.priority,
            )
            self._open[ask.name] = ask.name  # type: ignore[assignment]
            self._arrived[ask.name] = self.now
            self._scheduler.add_request(request)

    def _lose_patience(self) -> None:
        patience = {name: self._asks[name].hang_up_s for name in self._open}
        gone = [name for name, until in patience.items() if until is not None and until <= self.now]
        for name in gone:
            self._end(name)
        if gone:
            self._scheduler.finish_requests(gone, RequestStatus.FINISHED_ABORTED)
            self.num_hung_up += len(gone)

    def _step(self) -> None:
        before = {r: r.status for r in self._scheduler.waiting}
        scheduled = self._scheduler.schedule()
        self.num_preemptions += len(scheduled.preempted_req_ids or ())
        self._judge(before, [r.req_id for r in scheduled.scheduled_new_reqs if r.req_id not in self.waits])
        ids = list(scheduled.num_scheduled_tokens)
        sampled = [[] if self._scheduler.requests[i].is_prefill_chunk else [50] for i in ids]
        output = ModelRunnerOutput(
            req_ids=ids, req_id_to_index={i: n for n, i in enumerate(ids)}, sampled_token_ids=sampled
        )
        self._flight.append((scheduled, output))
        self.now += TOKEN_S * scheduled.total_num_scheduled_tokens
        while len(self._flight) > self._depth or (self._flight and not ids):
            self._complete(*self._flight.popleft())

    def _judge(self, before: dict[Request, RequestStatus], newcomers: list[str]) -> None:
        for name in newcomers:
            self.waits[name] = self.now - self._arrived[name]
        if not self._enforces or not newcomers:
            return
        waiting = set(self._scheduler.waiting)
        for left, status in ((r, s) for r, s in before.items() if r in waiting):
            arrived = self._arrived[left.request_id]
            over = [n for n in newcomers if left.priority <= self._asks[n].priority]
            assert not over or status != RequestStatus.PREEMPTED, f"{over} overtook preempted {left.request_id}"
            if self.now - arrived >= HOLD_S:
                younger = [n for n in over if self._arrived[n] > arrived]
                assert not younger, f"{younger} overtook {left.request_id}, past its bound"

    def _complete(self, scheduled: Any, output: ModelRunnerOutput) -> None:
        requests = {i: self._scheduler.requests.get(i) for i in output.req_ids}
        answers = self._scheduler.update_from_output(scheduled, output)
        for answer in (o for client in answers.values() for o in client.outputs if o.finished):
            request = requests[answer.request_id]
            assert request is not None
            ask = self._asks[answer.request_id]
            assert request.num_output_tokens == ask.max_tokens
            self._end(answer.request_id)
            if ask.num_more:
                self._follow(ask, tuple(request.all_token_ids))

    def _follow(self, ask: Ask, history: tuple[int, ...]) -> None:
        follower = replace(
            ask,
            name=ask.name + "+",
            at_s=self.now + 1.0,
            prompt=(*history, *[300 + ask.num_more] * 20),
            num_more=ask.num_more - 1,
        )
        self._asks[follower.name] = follower
        self._turns_left[follower.name] = 1
        self._coming = deque(sorted([*self._coming, follower], key=lambda a: a.at_s))

    def _settled(self) -> None:
        """Nothing of any request is left, and what is remembered of traces is what the table knows."""
        scheduler = self._scheduler
        assert sorted(self.served) == sorted(self._asks)
        assert not scheduler.requests
        assert not len(scheduler.waiting)
        assert not scheduler.running
        assert not scheduler.deferred_waiting
        assert scheduler.observer.num_unfinished == 0
        scheduler.observer.identity.check_invariants()
        assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == self._num_blocks - 1  # the null block
        if self._enforces:
            enforcer = scheduler.enforcer
            assert enforcer is not None, "policy failed and fell back to stock"
            turns = enforcer.turns
            assert not len(turns)
            assert not turns._open_of
            assert not turns._queued_of
            known = {trace.trace_id for trace in scheduler.observer.identity.traces}
            for remembered in (turns._tokens_of, enforcer.lengths._traces, enforcer.gaps._gaps):
                assert remembered.keys() <= known


def blocks(number: int, seed: int, tail: int = 28) -> tuple[int, ...]:
    """A prompt nobody else has, so long that it fills `number` blocks with four tokens of an answer."""
    return tuple([20 + seed % 400] * (32 * (number - 1) + tail - 1) + [450 + seed // 400])


def longest_wait_of_stock(model: str, asynchronous: bool, num_blocks: int, asks: list[Ask]) -> float:
    storm = Storm(build(model, asynchronous, num_blocks, mode="observe"), asks)
    storm.run()
    return max(storm.waits.values())


# One at a time, by a hand that knows the best order.

FEW_SEATS = pytest.param({"num_blocks": 100, "max_num_seqs": 1}, id="of seats")
FEW_TOKENS = pytest.param({"num_blocks": 100, "max_num_seqs": 16, "max_num_batched_tokens": 96}, id="of tokens a step")


@BOTH
@pytest.mark.parametrize("shortage", [pytest.param({"num_blocks": 13}, id="of blocks"), FEW_TOKENS])
def test_of_three_turns_the_one_with_the_least_work_goes_first(model, asynchronous, shortage):
    asks = [Ask("three", 0.0, blocks(12, 1)), Ask("one", 0.0, blocks(5, 2)), Ask("two", 0.0, blocks(8, 3))]
    storm = Storm(build(model, asynchronous, **shortage), asks)
    storm.run()
    assert storm.served == ["one", "two", "three"]


@BOTH
@pytest.mark.parametrize("shortage", [pytest.param({"num_blocks": 13}, id="of blocks"), FEW_SEATS])
def test_of_many_turns_the_one_with_the_least_work_goes_first(model, asynchronous, shortage):
    sizes = random.Random(1).sample(range(2, 13), 11)
    asks = [Ask(f"{size:02}", 0.0, blocks(size, size)) for size in sizes]
    storm = Storm(build(model, asynchronous, **shortage), asks)
    storm.run()
    assert storm.served == sorted(storm.served)


@BOTH
def test_a_long_history_in_hbm_is_less_work_than_a_short_prompt_that_is_new(model, asynchronous):
    history = blocks(10, 1)
    asks = [
        Ask("first turn", 0.0, history),
        Ask("new", 9.0, blocks(5, 2)),
        Ask("next turn", 9.0, (*history, *[50] * 4, *[60] * 30)),
    ]
    storm = Storm(build(model, asynchronous, 100, max_num_seqs=1), asks)
    storm.run()
    assert storm.served == ["first turn", "next turn", "new"]


@BOTH
def test_a_smaller_priority_goes_first_whatever_the_work(model, asynchronous):
    rng = random.Random(2)
    asks = [
        Ask(f"{priority:02}", 0.0, blocks(rng.randrange(7, 12), priority), priority=priority) for priority in range(20)
    ]
    rng.shuffle(asks)
    late = Ask("00 late", 1.0, blocks(11, 77), priority=0)
    storm = Storm(build(model, asynchronous, 13, scheduling_policy="priority"), [*asks, late])
    storm.run()
    assert [name for name in storm.served if name != late.name] == sorted(ask.name for ask in asks)
    assert storm.served.index(late.name) < 4, "it came while others were waiting, and more urgent"


@BOTH
def test_an_urgent_turn_that_needs_much_room_is_not_passed_by_small_ones_that_can_wait(model, asynchronous):
    small = [Ask(f"small {i}", 0.25 * i, blocks(3, i), 10, priority=1) for i in range(160)]
    urgent = Ask("urgent", 5.1, blocks(12, 401), priority=0)
    storm = Storm(build(model, asynchronous, 13, scheduling_policy="priority"), [*small, urgent])
    storm.run()
    assert storm.waits["urgent"] < HOLD_S / 2


@BOTH
def test_an_urgent_turn_is_not_passed_by_those_that_can_wait_however_long_they_have(model, asynchronous):
    batch = [Ask(f"batch {i:03}", 0.0, blocks(6, i), 40, priority=1) for i in range(80)]
    urgent = [Ask(f"urgent {i}", 2 * HOLD_S + 5.0 * i, blocks(6, 200 + i), priority=0) for i in range(6)]
    storm = Storm(build(model, asynchronous, 13, scheduling_policy="priority"), [*batch, *urgent])
    storm.run()
    assert max(storm.waits[ask.name] for ask in batch) > 3 * HOLD_S, "few waited long: this test would show nothing"
    assert max(storm.waits[ask.name] for ask in urgent) < HOLD_S / 2


def test_a_priority_counts_where_vllm_goes_by_it(model):
    asks = [Ask(f"{n}", 0.01 * n, blocks(8, n), priority=-n) for n in range(6)]
    storm = Storm(build(model, False, 13), asks)
    storm.run()
    assert storm.served == sorted(storm.served)


@BOTH
def test_a_turn_that_needs_the_whole_pool_waits_no_longer_than_the_bound(model, asynchronous):
    small = [Ask(f"small {i}", 0.25 * i, blocks(3, i), 10) for i in range(400)]
    large = Ask("large", 5.1, blocks(12, 401))
    storm = Storm(build(model, asynchronous, 13), [*small, large])
    storm.run()
    service_s = 2 * 12 * (STEP_S + 128 * TOKEN_S)  # those that run when the bound is reached
    assert HOLD_S / 2 < storm.waits["large"] <= HOLD_S + service_s, "else the bound was not what it waited for"


# Weather.


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


# Trouble.


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

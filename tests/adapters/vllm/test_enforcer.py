"""Policy in vLLM's own scheduler, without a model: everything is served, nothing leaks, under any weather."""

import random
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from impala_vllm.adapters.vllm import choice
from impala_vllm.adapters.vllm.tiers.manager import TierManager
from impala_vllm.adapters.vllm.watchdog import STALLED_S
from impala_vllm.config import load
from impala_vllm.core.admission import Plan
from impala_vllm.core.types import TraceId
from impala_vllm.plugin import register
from impala_vllm.replay import tiny_model
from tests.adapters.vllm.schedulers import build, from_config

BOTH = pytest.mark.parametrize("asynchronous", [False, True])
STEP_S = 0.1
FALLS_BACK = "impala: policy failed and falls back to stock order, serving continues"


@pytest.fixture(scope="module")
def model():
    register()
    return str(tiny_model.build("1m"))


@pytest.fixture
def said(monkeypatch):
    """What the scheduler says of faults."""
    lines: list[str] = []
    monkeypatch.setattr("impala_vllm.adapters.vllm.scheduler.logger.exception", lines.append)
    return lines


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


def serve(model: str, asynchronous: bool, num_blocks: int, num_agents: int, seed: int = 0, **weather: float) -> Batch:
    scheduler = build(model, asynchronous, mode="enforce", num_blocks=num_blocks)
    batch = Batch(scheduler, num_agents, 5, seed, num_blocks)
    batch.run(**weather)
    assert len(batch.served) == 5 * num_agents
    assert scheduler.enforcer.free.num_free_blocks == num_blocks - 1  # the null block is never free
    scheduler.observer.identity.check_invariants()
    return batch


@BOTH
def test_everybody_is_served_with_room_for_everybody(model, asynchronous):
    serve(model, asynchronous, num_blocks=400, num_agents=8)


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_everybody_is_served_with_room_for_three_of_sixty(model, asynchronous, seed):
    serve(model, asynchronous, num_blocks=40, num_agents=60, seed=seed)


@BOTH
def test_aborts_of_held_and_running_turns_leave_nothing_behind(model, asynchronous):
    serve(model, asynchronous, num_blocks=40, num_agents=40, abort_share=0.2)


def test_held_turns_are_told_apart_from_a_lack_of_capacity(model):
    scheduler = build(model, mode="enforce", num_blocks=40)
    batch = Batch(scheduler, 30, 4, 1, 40)
    held = []
    plan = scheduler.enforcer.plan

    def spy(now):
        plan(now)
        held.append(scheduler.enforcer.gate.num_held)
        assert scheduler.enforcer.gate.num_held <= len(scheduler.deferred_waiting)

    scheduler.enforcer.plan = spy
    batch.run()
    assert max(held) > 0


def test_what_the_table_forgets_policy_forgets(model):
    scheduler = build(model, mode="enforce", num_blocks=60)
    batch = Batch(scheduler, 10, 2, 3, 60)
    batch.run()
    assert scheduler.enforcer.free.claims()
    scheduler.observer.identity.tick(batch.now + 1e6)
    assert not scheduler.observer.identity.num_blocks
    assert not scheduler.enforcer.free.claims()
    assert not scheduler.enforcer.free._idle_since
    assert not scheduler.enforcer.turns.num_traces
    scheduler.enforcer.free.check_invariants()


def test_a_fault_of_policy_falls_back_to_stock_and_serves_on(model, said):
    scheduler = build(model, mode="enforce", num_blocks=40)
    batch = Batch(scheduler, 20, 3, 2, 40)
    plan, calls = scheduler.enforcer.plan, [0]

    def fail_at_30(now):
        calls[0] += 1
        if calls[0] == 30:
            raise RuntimeError("a bug of ours")
        plan(now)

    scheduler.enforcer.plan = fail_at_30
    batch.check = lambda: None  # type: ignore[method-assign]
    batch.run()
    assert len(batch.served) == 60
    assert scheduler.enforcer is None
    assert said == [FALLS_BACK]


def test_a_fault_amid_vllms_own_step_falls_back_to_stock_and_serves_on(model, said):
    scheduler = build(model, mode="enforce", num_blocks=40)
    batch = Batch(scheduler, 20, 3, 2, 40)
    policy = scheduler.enforcer
    calls = [0]

    def fail(traces):
        calls[0] += 1
        raise RuntimeError("a bug of ours")

    policy.idle.cheapest_first = fail
    batch.check = lambda: None
    batch.run()
    assert calls[0] == 1, "nothing was evicted, or policy went on"
    assert len(batch.served) == 60
    assert scheduler.enforcer is None
    assert said == [FALLS_BACK]


def test_a_fault_while_policy_is_given_up_harms_nobody(model, said):
    scheduler = build(model, mode="enforce", num_blocks=40)
    batch = Batch(scheduler, 20, 3, 2, 40)

    def fail(*_):
        raise RuntimeError("a bug of ours")

    scheduler.enforcer.reset = scheduler.enforcer.asks.ranked = fail
    batch.check = lambda: None
    batch.run()
    assert len(batch.served) == 60
    assert scheduler.enforcer is None
    assert said == [FALLS_BACK, "impala: policy left some of its order behind"]


def test_policy_survives_a_pool_that_somebody_else_keeps(model, monkeypatch):
    """As where another engine is slow to fetch the KV of turns that have ended."""
    warned = []
    monkeypatch.setattr("impala_vllm.adapters.vllm.watchdog.logger.warning", lambda text, *_: warned.append(text))
    scheduler = build(model, mode="enforce", num_blocks=40)
    batch = Batch(scheduler, 6, 3, 0, 40)
    pool = scheduler.kv_cache_manager.block_pool
    kept = pool.get_new_blocks(38)
    while batch.now < 4 * STALLED_S:
        batch._arrive()
        batch._step()
        batch.now += STEP_S
    assert not batch.served
    assert len(warned) == 1
    pool.free_blocks(kept)
    batch.run()
    assert len(batch.served) == 18
    assert scheduler.enforcer is not None
    assert not scheduler.enforcer.gate._watchdog.lets_all_through


def test_who_finds_no_room_is_passed_by_all_others_in_turn(model):
    """Three that vLLM cannot place, and one that it can; as where outputs turn out longer than they were thought."""
    scheduler = build(model, mode="enforce", num_blocks=12, rank__enabled=False)
    scheduler.enforcer.admission.plan = lambda asking, *_: Plan(list(asking), 0)
    scheduler.kv_cache_manager.block_pool.get_new_blocks(3)
    for number in range(3):
        send(scheduler, f"large {number}", [10 + number] * 350)
    send(scheduler, "fits", [20] * 100)
    placed = [list(scheduler.schedule().num_scheduled_tokens) for _ in range(4)]
    assert placed == [[], [], [], ["fits"]]


def test_a_plan_that_admits_nobody_is_given_up_with_a_word(model, said):
    scheduler = build(model, mode="enforce", num_blocks=40)
    scheduler.enforcer.admission.plan = lambda asking, *_: Plan([], len(asking))
    batch = Batch(scheduler, 3, 2, 0, 40)
    batch.check = lambda: None
    batch.run()
    assert len(batch.served) == 6
    assert scheduler.enforcer is None
    assert said == [FALLS_BACK]


@pytest.mark.parametrize("supersedes", [True, False])
def test_what_a_turn_leaves_of_its_traces_kv_is_nobodys_unless_that_is_switched_off(model, supersedes):
    """A trace goes on from before its last answer: that answer is not kept for it."""
    scheduler = build(model, mode="enforce", num_blocks=100, retention__supersede=supersedes)
    batch = Batch(scheduler, 1, 2, 0, 100)
    batch._history[0], batch._due[0] = [7] * 320, 0.0
    while batch._turns_left[0] == 2:
        batch._arrive()
        batch._step()
        batch.now += STEP_S
    queue = scheduler.enforcer.free
    (trace_id,) = queue.claims()
    assert queue.num_claimed(trace_id) >= 10
    batch._history[0] = [7] * 288 + [9] * 64  # nine of its blocks, then other words
    batch.now = batch._due[0]
    batch._arrive()
    batch._step()
    assert scheduler.enforcer.turns.runs(trace_id)
    assert (queue.num_claimed(trace_id) == 0) == supersedes
    queue.check_invariants()


def test_what_all_samples_of_a_turn_leave_behind_is_its_traces(model):
    scheduler = build(model, mode="enforce", num_blocks=40)
    for number in range(3):  # as vLLM names the children of n=3
        send(scheduler, f"{number}_turn", [7] * 150)
    for _ in range(3):
        complete(scheduler, scheduler.schedule())
    assert not scheduler.has_requests()
    ((_, num_blocks),) = scheduler.enforcer.free.claims().items()
    assert num_blocks >= 4, "a prompt of four full blocks"
    assert scheduler.enforcer.free.num_unclaimed + num_blocks == 39
    assert not scheduler.observer._link_of


def test_a_turn_that_is_broken_off_says_nothing_of_how_long_answers_are(model):
    scheduler = build(model, mode="enforce", num_blocks=400)
    lengths = scheduler.enforcer.lengths
    before = lengths.expect(None)
    for number in range(50):  # clients that hang up while they are held, and send again
        request = Request(f"r{number}", [7] * 64, SamplingParams(max_tokens=9), None)
        scheduler.add_request(request)
        scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    assert lengths.expect(None) == before


def test_gaps_are_learned_by_tool_from_token_ids(model):
    scheduler = build(model, mode="enforce", num_blocks=400)
    marker = next(iter(scheduler.enforcer._tool_call_tokens))
    policy = scheduler.enforcer
    learned = []
    finish = policy.gaps.finish
    policy.gaps.finish = lambda trace_id, now, signature: (learned.append(signature), finish(trace_id, now, signature))
    for i in range(20):
        request = Request(f"r{i}", [7] * 64, SamplingParams(max_tokens=9), None)
        request.append_output_token_ids([50, marker, 60, 61 + i % 2, 70 + i])
        policy.arrive(request, TraceId(f"t{i}"), float(i))
        policy.finish(request, float(i))
    assert len(set(learned[-6:])) == 2
    assert all(signature.startswith("tool:60.") for signature in learned[-6:])


def test_a_parent_is_expected_once_its_last_child_has_ended(model):
    scheduler = build(model, mode="enforce", num_blocks=400)
    policy, traces = scheduler.enforcer, scheduler.observer.identity.traces
    told = []
    policy.gaps.delegate = lambda trace_id: told.append(("delegate", trace_id))
    policy.gaps.drain = lambda trace_id, now: told.append(("drain", trace_id))

    def send(name, session, parent=None):
        request = Request(name, [7] * 64, SamplingParams(max_tokens=4), None, 0, 0.0)
        request.session_id = session
        scheduler.add_request(request)
        trace_id = policy.trace_of(request)
        if parent is not None:
            traces.adopt(traces.get(trace_id), traces.get(parent))
        return trace_id

    parent = send("p", "parent")
    scheduler.finish_requests("p", RequestStatus.FINISHED_LENGTH_CAPPED)
    children = [send(f"c{i}", f"child{i}", parent) for i in range(2)]
    send("c0b", "child0")
    assert told == [("delegate", parent)]
    for name in ("c0", "c1"):
        scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
    assert told == [("delegate", parent)], "one child still has a turn open"
    scheduler.finish_requests("c0b", RequestStatus.FINISHED_ABORTED)
    assert told == [("delegate", parent), ("drain", parent)]
    assert len(set(children)) == 2


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


def test_what_is_freed_behind_a_step_in_flight_is_still_its_traces(model):
    """As with any connector that loads: a step in flight may still write to the blocks of who has ended."""
    scheduler = build(model, asynchronous=True, mode="enforce")
    scheduler.defer_block_free = True
    requests = [send(scheduler, f"r{i}", [7 + i] * 32 * (2 + i)) for i in range(2)]
    traces = [scheduler.enforcer.trace_of(request) for request in requests]
    steps = [scheduler.schedule(), scheduler.schedule()]
    complete(scheduler, steps[0])
    assert not scheduler.requests
    assert not scheduler.enforcer.free.claims()
    complete(scheduler, steps[1])
    assert scheduler.enforcer.free.claims() == {traces[0]: 2, traces[1]: 3}
    assert not scheduler.enforcer.claims._deferred
    scheduler.enforcer.free.check_invariants()


def test_what_a_connector_keeps_after_the_end_is_still_its_traces(model, monkeypatch):
    """As where KV is sent to another server: blocks are freed when it has arrived."""
    scheduler = build(model, mode="enforce")
    monkeypatch.setattr(scheduler, "_connector_finished", lambda request: (True, None))
    request = send(scheduler, "r", [7] * 64)
    trace_id = scheduler.enforcer.trace_of(request)
    complete(scheduler, scheduler.schedule())
    assert not scheduler.enforcer.free.claims()
    scheduler._free_blocks(request)
    assert scheduler.enforcer.free.claims() == {trace_id: 2}
    assert not scheduler.enforcer.claims._unfreed


def tiered(model, num_blocks=12):
    """A scheduler over vLLM's own connector, with a host tier that nobody moves bytes for."""
    settings = load(None, {"mode": ("test", "enforce")})
    config = EngineArgs(
        model=model,
        max_model_len=512,
        block_size=32,
        scheduler_cls=choice.Choice.of(settings),
        kv_transfer_config=KVTransferConfig(
            kv_connector="OffloadingConnector",
            kv_role="kv_both",
            kv_connector_extra_config={
                "spec_name": "VirtualSpec",
                "spec_module_path": "benchmarks.virtual.tiers",
                "make_manager": lambda tokens: TierManager(32, 4096, tokens),
            },
        ),
    ).create_engine_config()
    config.scheduler_config.async_scheduling = False
    return from_config(config, num_blocks)


def test_who_waits_for_nvme_is_not_shown_to_a_step_where_nobody_can_tell_what_is_in_reach_either(model):
    scheduler = tiered(model, 100)
    policy = scheduler.enforcer
    policy.asks._group = None  # as with windows alone
    policy.tiers.load = lambda asks, now: [ask for ask in asks if ask.turn.request_id != "reads"]
    for name in ("reads", "computes"):
        send(scheduler, name, [7] * 64)
    assert list(scheduler.schedule().num_scheduled_tokens) == ["computes"]
    assert policy.gate.kept_back() == (frozenset(), frozenset({"reads"}))


def test_samples_of_a_turn_are_no_turns_to_the_tiers(model):
    scheduler = tiered(model, 40)
    manager = scheduler.enforcer.tiers.manager
    for turn in range(2):
        for number in range(3):
            send(scheduler, f"{number}_turn{turn}", [7] * (150 + 40 * turn))
        for _ in range(3):
            complete(scheduler, scheduler.schedule())
    assert not scheduler.running
    assert manager.num_resumes == 1
    assert [len(manager.turns.keys_of(trace.trace_id)) for trace in scheduler.observer.identity.traces] == [5]


def test_weights_that_change_empty_the_tiers_however_often_between_two_steps(model):
    scheduler = tiered(model)
    manager, side = scheduler.enforcer.tiers.manager, scheduler.connector.connector_scheduler
    send(scheduler, "r", [7] * 128)
    complete(scheduler, scheduler.schedule())
    scheduler.schedule()
    assert side._jobs
    assert len(manager.host.pool) > 0
    for _ in range(3):
        scheduler.weights_changed()
        assert (len(manager.host.pool), len(side._jobs)) == (0, 0)
    assert scheduler.reset_connector_cache()


def test_what_hbm_has_of_weights_before_does_not_come_down_again(model):
    scheduler = tiered(model, 40)
    manager = scheduler.enforcer.tiers.manager
    send(scheduler, "before", [7] * 128)
    complete(scheduler, scheduler.schedule())
    scheduler.weights_changed()
    send(scheduler, "after", [7] * 128)  # finds the old blocks, as in stock
    complete(scheduler, scheduler.schedule())
    scheduler.schedule()
    assert len(manager.host.pool) == 0
    assert not scheduler.running
    scheduler.connector.connector_scheduler._jobs.clear()
    assert scheduler.reset_prefix_cache()
    send(scheduler, "fresh", [7] * 128)
    complete(scheduler, scheduler.schedule())
    scheduler.schedule()
    assert len(manager.host.pool) > 0


def test_weights_that_change_while_hbm_is_empty_leave_the_tiers_at_work(model):
    scheduler = tiered(model, 40)
    scheduler.weights_changed()
    send(scheduler, "fresh", [7] * 128)
    complete(scheduler, scheduler.schedule())
    scheduler.schedule()
    assert len(scheduler.enforcer.tiers.manager.host.pool) > 0


def test_a_session_whose_client_thinks_is_no_reason_to_hold_others(model):
    scheduler = tiered(model)
    session = send(scheduler, "session", [7] * 64, resumable=True)
    send(scheduler, "idle", [8] * 128)
    complete(scheduler, scheduler.schedule())
    assert session.status == RequestStatus.WAITING_FOR_STREAMING_REQ
    assert sum(scheduler.enforcer.free.claims().values()) == 4
    scheduler.enforcer.idle.kept_blocks = 4  # expected back in a moment
    send(scheduler, "other", [9] * 192)
    assert list(scheduler.schedule().num_scheduled_tokens) == ["other"]


@BOTH
def test_a_cold_stem_that_many_ask_for_at_once_is_computed_once(model, asynchronous):
    stem, own, num_jobs = 384, 64, 8
    scheduler = build(model, asynchronous, mode="enforce", num_blocks=400)
    scheduler.max_num_scheduled_tokens = 96  # the stem takes several steps
    batch = Batch(scheduler, 0, 0, 0, 400)
    for job in range(num_jobs):
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        prompt = [7] * stem + [100 + job] * own
        scheduler.add_request(Request(f"j{job}", prompt, params, None, 0, 0.0, block_hasher=batch._hasher))
    computed = 0
    schedule = scheduler.schedule

    def count(*args):
        nonlocal computed
        output = schedule(*args)
        computed += output.total_num_scheduled_tokens
        return output

    scheduler.schedule = count
    batch._end = lambda request_id, aborted=False: None
    batch._open = {f"j{job}": job for job in range(num_jobs)}
    batch._history = {job: [] for job in range(num_jobs)}
    while scheduler.has_requests():
        batch._step()
        batch.now += STEP_S
    assert computed == stem + num_jobs * own

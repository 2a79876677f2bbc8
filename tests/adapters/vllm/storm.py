"""Storms over policy in vLLM's own scheduler, without a model and with a clock of ours.

Every step is judged: the free queue adds up, nobody preempted or past the bound is overtaken. At the end of
each storm everybody has an answer, every block is free again and policy remembers no request.
"""

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
from tests.adapters.vllm.batch import Batch
from tests.adapters.vllm.schedulers import from_config

HOLD_S = 20.0
TOKEN_S = 2e-4
"""What a token of a step takes, beside STEP_S for the step."""


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

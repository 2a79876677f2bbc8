"""An engine without a model: vLLM's own scheduler decides, a `Timing` says how long a step takes.

Everything but compute is the real thing: vLLM's scheduler and KV cache manager, impala's hooks and policy, the
clients of `impala_vllm.replay`. Outputs are the recorded ones.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from benchmarks.virtual.tiers import Tiers, VirtualWorker
from impala_vllm.adapters.vllm import choice
from impala_vllm.adapters.vllm.tiers.policy import tier_manager
from impala_vllm.config import Settings
from impala_vllm.replay.client import Answer
from impala_vllm.replay.plan import PlannedTurn
from impala_vllm.sim import timing as timings
from impala_vllm.sim.timing import Timing

IDLE_STEP_S = 0.001
"""What a step costs in which nothing could be scheduled."""


TIMINGS = {name: timings.load(name) for name in ("cpu-26m", "cpu-8m-avx2", "cpu-5m-avx2")}
"""Of engines that a CPU runs."""


def describe(timing: Timing) -> str:
    """One line for a record."""
    return (
        f"{timing.name}: {timing.fixed_s:g} s a step, {timing.prefill_s_per_token:g} s a prompt token and "
        f"{timing.prefill_s_per_token_and_context:g} s for each token before it"
    )


class VirtualEngine:
    """One engine, and the client that sends it planned turns. Use on a loop of `clock`, as a context manager."""

    def __init__(
        self,
        model: Path,
        settings: Settings | None,
        timing: Timing,
        *,
        num_blocks: int,
        block_size: int = 32,
        max_model_len: int = 8192,
        max_num_seqs: int = 128,
        tiers: Tiers | None = None,
        eos: int,
    ) -> None:
        """`settings` None: stock."""
        init_none_hash(sha256)
        args: dict[str, Any] = {} if settings is None else {"scheduler_cls": choice.Choice.of(settings)}
        if tiers is not None:
            args["kv_transfer_config"] = tiers.connector()
        config = EngineArgs(
            model=str(model),
            max_model_len=max_model_len,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=2048,
            **args,
        ).create_engine_config()
        config.scheduler_config.async_scheduling = False
        config.cache_config.num_gpu_blocks = num_blocks
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=32, dtype=torch.float32)
        self.scheduler: Any = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
            hash_block_size=block_size,
        )
        self.computed_tokens = 0
        self.busy_s = 0.0
        self._timing = timing
        self._eos = eos
        self._hasher = get_request_block_hasher(block_size, sha256)
        self._worker = VirtualWorker(tiers.host_rate, self._now) if tiers is not None else None
        self._open: dict[str, _Open] = {}
        self._awake = asyncio.Event()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def __aenter__(self) -> "VirtualEngine":
        loop = asyncio.get_running_loop()
        if hasattr(self.scheduler, "observer"):
            self.scheduler.observer.clock = loop.time
        self._task = loop.create_task(self._loop())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def send(self, turn: PlannedTurn, request_id: str, session_id: str) -> Answer:
        """Serve one turn, as `replay.client.Client` does."""
        loop = asyncio.get_running_loop()
        params = SamplingParams(max_tokens=len(turn.output), temperature=0.0)
        params._eos_token_id = self._eos
        start_s = loop.time()
        request = Request(request_id, list(turn.prompt), params, None, 0, start_s, block_hasher=self._hasher)
        opened = self._open[request_id] = _Open(turn.output, loop.create_future())
        self.scheduler.add_request(request)
        self._awake.set()
        await opened.done
        return Answer(start_s, loop.time(), opened.first_s, len(turn.prompt), opened.num_sent, opened.num_cached)

    def tier_stats(self) -> dict[str, float]:
        """What our tiers have counted by the end of a run; empty where there are none."""
        manager = tier_manager(self.scheduler)
        if manager is None:
            return {}
        manager.one_shots.end_all()
        return manager.stats()

    async def _loop(self) -> None:
        try:
            await self._steps()
        except Exception as e:
            for opened in self._open.values():
                opened.done.set_exception(e)
            raise

    async def _steps(self) -> None:
        while True:
            if not self.scheduler.has_requests():
                self._awake.clear()
                await self._awake.wait()
            scheduled = self.scheduler.schedule()
            if self._worker is not None:
                self._worker.start(scheduled)
            step_s = self._cost_s(scheduled) if scheduled.total_num_scheduled_tokens else IDLE_STEP_S
            self.busy_s += step_s
            await asyncio.sleep(step_s)
            self._update(scheduled)

    def _cost_s(self, scheduled: SchedulerOutput) -> float:
        prompt: list[tuple[int, int]] = []
        contexts: list[int] = []
        for request_id, count in scheduled.num_scheduled_tokens.items():
            request = self.scheduler.requests[request_id]
            before = request.num_computed_tokens - count
            if before < request.num_prompt_tokens:
                prompt.append((count, before))
                self.computed_tokens += count
            else:
                contexts.append(before)
        return self._timing.step_s(prompt, len(contexts), sum(contexts))

    def _update(self, scheduled: SchedulerOutput) -> None:
        now = asyncio.get_running_loop().time()
        ids = list(scheduled.num_scheduled_tokens)
        sampled: list[list[int]] = []
        for request_id in ids:
            request, opened = self.scheduler.requests[request_id], self._open[request_id]
            if request.num_computed_tokens < request.num_tokens:
                sampled.append([])
                continue
            sampled.append([opened.output[request.num_output_tokens]])
            opened.num_sent += 1
            if opened.first_s is None:
                opened.first_s = now
        output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: i for i, name in enumerate(ids)},
            sampled_token_ids=sampled,
            kv_connector_output=self._worker.finished() if self._worker is not None else None,
        )
        for answers in self.scheduler.update_from_output(scheduled, output).values():
            for answer in answers.outputs:
                opened = self._open[answer.request_id]
                if answer.prefill_stats is not None:
                    opened.num_cached = answer.prefill_stats.num_cached_tokens
                if answer.finished:
                    self._open.pop(answer.request_id).done.set_result(None)


@dataclass(slots=True)
class _Open:
    output: tuple[int, ...]
    done: "asyncio.Future[None]"
    first_s: float | None = None
    num_sent: int = 0
    num_cached: int = 0

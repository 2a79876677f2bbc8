"""A real engine in this process, one of three arms, and the client that sends it planned turns without HTTP."""

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import device
from benchmarks.gpu.out import Skipped
from impala_vllm.replay import counters
from impala_vllm.replay.client import Answer
from impala_vllm.replay.plan import PlannedTurn

GIB = 1 << 30
FORCED = {"v1": "impala_vllm.adapters.vllm.forced_replay:ForcedReplay", "v2": "benchmarks.gpu.forced:Forced"}
GRAPH_SIZES = [1, 2, 4, 8, 16, 32]
VLLM_SWAP = "impala-vllm-swap"
"""The arm in which impala decides and vLLM's own worker copies."""
FP8 = "impala-fp8"
"""The arm whose tiers keep half the bytes, at a loss."""


@dataclass(frozen=True, slots=True)
class Mode:
    """How the engine runs its model: the least that is known to work decides."""

    runner: str = "v2"
    has_graphs: bool = True
    attention: str | None = None
    """None: vLLM's choice."""

    def describe(self) -> str:
        graphs = "CUDA graphs for decoding" if self.has_graphs else "eager"
        return f"model runner {self.runner.upper()}, {graphs}, {self.attention or 'default'} attention"


@dataclass(frozen=True, slots=True)
class Setting:
    """What all arms have in common."""

    model: Path
    num_blocks: int
    max_model_len: int
    host_bytes: int
    mode: Mode
    max_num_seqs: int = 32
    block_size: int = 16
    always_loads: bool = False
    """impala takes what a tier has even where computing it again is sooner, as it is for a small model."""


def start(arm: str, setting: Setting) -> Any:
    """An `LLM`. Raises Skipped for an arm that cannot be built here."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if setting.mode.runner == "v2" else "0"
    arguments = _common(setting) | _arm(arm, setting)
    if arm == FP8:
        arguments["dtype"] = "bfloat16"  # also in a rehearsal: there is no FP8 of anything else
    from vllm import LLM

    return LLM(**arguments)


def mover() -> str | None:
    """Which worker of this process's engine moves KV below HBM; None where none does."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if not has_kv_transfer_group():
        return None
    worker = getattr(getattr(get_kv_transfer_group(), "connector_worker", None), "worker", None)
    return f"{type(worker).__name__}{', as FP8' if getattr(worker, 'is_demoting', False) else ''}"


def _common(setting: Setting) -> dict[str, Any]:
    mode = setting.mode
    arguments: dict[str, Any] = {
        "model": str(setting.model),
        "load_format": "auto" if list(setting.model.glob("*.safetensors")) else "dummy",
        "max_model_len": setting.max_model_len,
        "max_num_seqs": setting.max_num_seqs,
        "num_gpu_blocks_override": setting.num_blocks,
        "block_size": setting.block_size,
        "enable_prefix_caching": True,
        "disable_log_stats": False,
        "logits_processors": [FORCED[mode.runner]],
        "seed": 0,
    }
    if device.is_rehearsal():
        return arguments | {"dtype": "float32", "enforce_eager": True}
    arguments |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.85, "enforce_eager": not mode.has_graphs}
    if mode.has_graphs:
        arguments["compilation_config"] = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": GRAPH_SIZES,
        }
    if mode.attention is not None:
        arguments["attention_backend"] = mode.attention
    return arguments


def _arm(arm: str, setting: Setting) -> dict[str, Any]:
    if arm == "stock":
        return {}
    if arm == "upstream":
        return {"kv_transfer_config": _upstream(setting.host_bytes)}
    assert arm in ("impala", VLLM_SWAP, FP8), arm
    try:
        from impala_vllm.adapters.vllm.choice import Choice
        from impala_vllm.adapters.vllm.offload_spec import ImpalaOffloadingSpec
        from impala_vllm.config import load
        from impala_vllm.plugin import register
    except ImportError as e:
        raise Skipped(f"no impala with tiers here ({e})") from e
    assert ImpalaOffloadingSpec is not None  # what the settings below ask for
    register()
    flags = {
        "tiers.host_gib": ("--host-gib", setting.host_bytes / GIB),
        "planner.choose_loads": ("this benchmark", not setting.always_loads),
        "tiers.swap": ("this benchmark", "vllm" if arm == VLLM_SWAP else "impala"),
        "tiers.kv_format": ("this benchmark", "fp8" if arm == FP8 else "exact"),
    }
    settings = load(flags=flags)
    return {"scheduler_cls": Choice.of(settings)}


def _upstream(host_bytes: int) -> Any:
    from vllm.config import KVTransferConfig

    extra: dict[str, Any] = {"cpu_bytes_to_use": host_bytes, "offload_prompt_only": False}
    if device.is_rehearsal():  # upstream's own worker refuses a CPU
        extra |= {"spec_name": "UpstreamSpec", "spec_module_path": "impala_vllm.adapters.vllm.upstream_spec"}
    return KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=extra)


class Sender:
    """Sends turns to an `LLM` and steps it, always in the same thread, while there is anything to do: CUDA keeps the
    current stream by thread.

    A context manager on a running loop; `impala_vllm.replay.load.drive` sends through it.
    """

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self._core = getattr(self._engine.engine_core, "engine_core", None)
        self._open: dict[str, _Open] = {}
        self._new: list[_Open] = []
        self._awake = asyncio.Event()
        self._stepper = ThreadPoolExecutor(1, "engine")

    async def __aenter__(self) -> "Sender":
        self._task = asyncio.get_running_loop().create_task(self._loop())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._stepper.shutdown()

    async def send(self, turn: PlannedTurn, request_id: str, session_id: str) -> Answer:
        """Serve one turn. Never raises for what the engine does: the answer says."""
        loop = asyncio.get_running_loop()
        opened = _Open(request_id, turn, loop.time(), loop.create_future())
        self._new.append(opened)
        self._awake.set()
        try:
            await opened.done
        except Exception as e:
            return replace(opened.answer(loop.time()), error=f"{type(e).__name__}: {e}"[:300])
        return opened.answer(loop.time())

    async def _loop(self) -> None:
        loop = asyncio.get_running_loop()
        step = partial(copy_context().run, self._engine.step)
        try:
            while True:
                if not self._new and not self._has_work():
                    self._awake.clear()
                    await self._awake.wait()
                for opened in self._new:
                    self._add(opened)
                self._new.clear()
                # The engine is touched by one thread at a time: this one waits for that one.
                outputs = await loop.run_in_executor(self._stepper, step)
                now = loop.time()
                for output in outputs:
                    self._take(output, now)
        except Exception as e:
            for opened in (*self._open.values(), *self._new):
                if not opened.done.done():
                    opened.done.set_exception(e)
            raise

    def _has_work(self) -> bool:
        """Also with no request open: a connector may have transfers to finish."""
        if self._open or self._core is None:
            return bool(self._open)
        return bool(self._core.scheduler.has_requests() or self._core.batch_queue)

    def _add(self, opened: "_Open") -> None:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            max_tokens=len(opened.turn.output),
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"forced_output": list(opened.turn.output)},
        )
        self._open[opened.request_id] = opened
        try:
            self._engine.add_request(opened.request_id, {"prompt_token_ids": list(opened.turn.prompt)}, params)
        except ValueError as e:  # this turn does not fit; others may
            del self._open[opened.request_id]
            opened.done.set_exception(e)

    def _take(self, output: Any, now: float) -> None:
        opened = self._open.get(output.request_id)
        if opened is None:
            return
        opened.num_cached = max(opened.num_cached, output.num_cached_tokens or 0)
        opened.emitted += list(output.outputs[0].token_ids)
        if opened.emitted and opened.first_s is None:
            opened.first_s = now
        if output.finished:
            del self._open[output.request_id]
            if not opened.done.done():
                opened.done.set_result(None)


@dataclass(slots=True)
class _Open:
    request_id: str
    turn: PlannedTurn
    start_s: float
    done: "asyncio.Future[None]"
    first_s: float | None = None
    num_cached: int = 0
    emitted: list[int] = field(default_factory=list[int])

    def answer(self, now: float) -> Answer:
        wrong = None if tuple(self.emitted) == self.turn.output else "it emitted other tokens than were forced"
        return Answer(
            self.start_s, now, self.first_s, len(self.turn.prompt), len(self.emitted), self.num_cached, error=wrong
        )


def scrape() -> Mapping[str, float]:
    """The engine's counters, as its /metrics would say; empty where there are none."""
    try:
        from prometheus_client import generate_latest
    except ImportError:
        return {}
    return counters.parse(generate_latest().decode())

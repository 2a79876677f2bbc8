"""Which vLLM this version of impala works with, and the seams it stands on.

The only file that knows vLLM versions. `check()` looks at every seam by signature, so that a
changed vLLM is named by what changed rather than by a crash.
"""

import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any

from impala_vllm.config import ConfigError

OLDEST, NEWEST_EXCLUSIVE = (0, 32), (0, 33)
WINDOW = "0.32.x"


@dataclass(frozen=True, slots=True)
class Seam:
    """One thing of vLLM's that impala uses."""

    name: str
    use: str
    problem: str | None
    """None: as expected."""


def version() -> str | None:
    """vLLM's version, or None where it is not installed or cannot be imported."""
    try:
        return importlib.import_module("vllm.version").__version__
    except (ImportError, OSError):  # OSError: a shared library of torch's is missing
        return None


def import_problem() -> str | None:
    """Why an installed vLLM cannot be imported, in one line; None where it can, or where there is none."""
    try:
        if importlib.util.find_spec("vllm") is not None:
            importlib.import_module("vllm.version")
    except (ImportError, OSError) as e:
        return f"{type(e).__name__}: {e}".splitlines()[0]
    return None


def is_supported(version: str) -> bool:
    """Whether a version string lies in the tested window."""
    parts = version.split("+")[0].split(".")
    try:
        return OLDEST <= (int(parts[0]), int(parts[1])) < NEWEST_EXCLUSIVE
    except (IndexError, ValueError):
        return False


def require() -> None:
    """Raise ConfigError, in one line, where this vLLM cannot carry impala."""
    from impala_vllm import __version__

    found = version()
    if found is None:
        raise ConfigError("vLLM is not installed; pip install 'impala-vllm[vllm]'")
    if not is_supported(found):
        raise ConfigError(
            f"vLLM {found} is not supported: impala {__version__} works with {WINDOW}; "
            "install that, or leave out --scheduler impala"
        )
    broken = [s for s in check() if s.problem is not None]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise ConfigError(f"vLLM {found}: {broken[0].name}: {broken[0].problem}{more}; run `impala doctor`")


def check() -> list[Seam]:
    """Look at every seam. Imports vLLM: seconds the first time."""
    return [Seam(name, use, _problem(name, expected)) for name, use, expected in _SEAMS]


_SEAMS: list[tuple[str, str, tuple[str, ...] | None]] = [
    ("vllm.engine.arg_utils:EngineArgs.add_cli_args", "the flags", ("parser",)),
    ("vllm.engine.arg_utils:EngineArgs.from_cli_args", "the flags", ("args",)),
    ("vllm.engine.arg_utils:EngineArgs.create_engine_config", "settings reach the engine", ("self",)),
    ("vllm.engine.arg_utils:EngineArgs.scheduler_cls", "selecting the scheduler", None),
    ("vllm.config:SchedulerConfig.get_scheduler_cls", "selecting the scheduler", ("self",)),
    ("vllm.v1.core.sched.scheduler:Scheduler.__init__", "base of the scheduler", ("self", "vllm_config")),
    ("vllm.v1.core.sched.async_scheduler:AsyncScheduler.__init__", "base of the scheduler", ("self",)),
    ("vllm.v1.core.sched.scheduler:Scheduler.add_request", "arrivals", ("self", "request")),
    ("vllm.v1.core.sched.scheduler:Scheduler._free_request", "finishes", ("self", "request", "delay_free_blocks")),
    (
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        "heartbeat",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    (
        "vllm.v1.core.sched.scheduler:Scheduler._preempt_request",
        "ledger: preemptions",
        ("self", "request", "timestamp"),
    ),
    ("vllm.v1.core.sched.scheduler:Scheduler.shutdown", "ledger: the last records", ("self",)),
    ("vllm.v1.metrics.stats:PrefillStats.set", "ledger: tokens", ("self", "num_prompt_tokens")),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.get_external_cache_hit_sources",
        "ledger: which tier tokens come from",
        ("self", "request", "num_external_tokens"),
    ),
    ("vllm.v1.core.sched.scheduler:Scheduler.schedule", "a plan before each step", ("self", "throttle_prefills")),
    ("vllm.v1.core.sched.scheduler:Scheduler._free_request_blocks", "whose KV is idle", ("self", "request")),
    ("vllm.v1.core.sched.scheduler:Scheduler._drain_deferred_frees", "whose KV is idle", ("self",)),
    ("vllm.v1.core.sched.scheduler:Scheduler.reset_prefix_cache", "whose KV is idle", ("self",)),
    ("vllm.v1.core.sched.request_queue:create_request_queue", "the way back to stock order", ("policy",)),
    ("vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.popleft_n", "eviction by value", ("self", "n")),
    ("vllm.v1.core.kv_cache_utils:make_block_hash_with_group_id", "what of a prompt is in HBM", ("block_hash",)),
    ("vllm.v1.core.sched.scheduler:Scheduler.get_request_counts", "health", ("self",)),
    ("vllm.v1.core.sched.scheduler:Scheduler.pause_state", "health", None),
    ("vllm.v1.core.sched.scheduler:Scheduler._inflight_prefill_reserved_blocks", "room beside loads", ("self",)),
    ("vllm.v1.core.sched.scheduler:Scheduler.reset_connector_cache", "tiers: reset", ("self",)),
    ("vllm.v1.kv_offload.base:OffloadingManager.lookup", "tiers", ("self", "key", "req_context")),
    ("vllm.v1.kv_offload.base:OffloadingManager.prepare_store", "tiers", ("self", "keys", "req_context")),
    ("vllm.v1.kv_offload.base:OffloadingManager.complete_store", "tiers", ("self", "keys", "req_context")),
    ("vllm.v1.kv_offload.base:OffloadingManager.prepare_load", "tiers", ("self", "keys", "req_context")),
    ("vllm.v1.kv_offload.base:ReqContext.get_offload_key_position", "tiers", ("self", "key")),
    ("vllm.v1.kv_offload.base:make_offload_key", "tiers", ("block_hash", "group_idx")),
    ("vllm.v1.kv_offload.tiering.spec:TieringOffloadingSpec.create_worker", "tiers: moving bytes", ("self",)),
    (
        "vllm.v1.kv_offload.cpu.shared_offload_region:SharedOffloadRegion.__init__",
        "tiers: host memory",
        ("self", "engine_id", "num_chunks"),
    ),
    ("vllm.v1.request:Request.get_finished_reason", "how a turn ended", ("self",)),
    ("vllm.v1.engine.core:EngineCore.collective_rpc", "tiers: changed weights", ("self", "method")),
    ("vllm.v1.engine.core:EngineCore.__init__", "the snapshot method", ("self", "vllm_config")),
    ("vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async", "/impala/*", ("self", "method")),
    ("vllm.v1.engine.core_client:AsyncMPClient.add_request_async", "tenant and session id", ("self", "request")),
    ("vllm.sampling_params:SamplingParams.extra_args", "tenant and session id", None),
    (
        "vllm.entrypoints.serve.middleware.authenticate:AuthenticationMiddleware.verify_token",
        "API keys for /impala/traces",
        ("self", "headers"),
    ),
    (
        "vllm.entrypoints.serve.middleware.register:init_entrypoints_middleware",
        "the middleware",
        ("args", "app"),
    ),
]


def _problem(name: str, leading: tuple[str, ...] | None) -> str | None:
    """What is wrong with `module:dotted.name`, whose first parameters should be `leading`."""
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as e:
        return f"cannot import {module} ({e})"
    for part in path.split("."):
        if not hasattr(found, part) and part not in getattr(found, "__annotations__", ()):
            return f"has no {part}"
        found = getattr(found, part, None)
    if leading is None:
        return None
    parameters = tuple(inspect.signature(found).parameters)
    if parameters[: len(leading)] != leading:
        return f"takes ({', '.join(parameters)}), expected ({', '.join(leading)}, ...)"
    return None

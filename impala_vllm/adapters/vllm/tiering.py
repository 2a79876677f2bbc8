"""Whether a server gets tiers below HBM, and how large: what becomes of vLLM's KV transfer configuration.

A connector of the user's own always wins. Without one, and with policy on, the host tier is sized from free memory
unless a size was given; where vLLM cannot have a connector the tiers are left out with one line.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from impala_vllm.adapters.vllm import accelerators, free_memory, model_identity
from impala_vllm.config import Config, ConfigError, KvFormat, Mode

SHM = "/dev/shm"
"""Where vLLM makes the host tier's memory."""
FREE_SHARE = 0.25
"""Of free memory, most for one server's host tier: what else the machine runs is unknown."""
MACHINE_SHARE = 0.5
"""Of free memory, for the host tiers of all servers of a machine: they may start together, one for each accelerator."""
SHM_SHARE = 0.8
MIN_AUTO_GIB = 1.0
STAGING_GIB = 1.0
"""Host tier under an NVMe tier where nothing else sizes it: NVMe is read through it."""
CHUNK_TOKENS = 32
"""Unit of offload, at least: smaller ones cost bookkeeping, larger ones cut more off the end of a prompt."""
GIB = 1 << 30
EXTRA_KEY = "impala"
"""Where in `kv_connector_extra_config` the spec finds what is not upstream's."""


def build(engine_args: Any, settings: Config, build_config: Callable[[], Any], say: Callable[[str], None]) -> Any:
    """The finished VllmConfig, with tiers where there can be some. `build_config` is vLLM's own way to make one.

    Raises ConfigError where what was asked for cannot be.
    """
    size_gib = _host_gib(engine_args, settings, say)
    if not size_gib:
        return build_config()
    engine_args.kv_transfer_config = _connector(size_gib, settings)
    try:
        config = build_config()
        reason = _reason_against(config, settings)
    except (ValueError, AssertionError, NotImplementedError, RuntimeError) as e:
        if settings.tiers.host_gib is not None:
            raise
        config, reason = None, str(e).splitlines()[0][:200]
    if reason is None:
        _check_nvme_is_near(config, settings)
        _finish(config, settings, say)
        return config
    engine_args.kv_transfer_config = None
    say(f"no tiers below HBM: {reason}")
    return build_config()


def _host_gib(engine_args: Any, settings: Config, say: Callable[[str], None]) -> float:
    """0: no tiers."""
    tiers = settings.tiers
    asked = bool(tiers.host_gib) or tiers.nvme_path is not None
    if settings.mode is not Mode.ENFORCE:
        if asked:
            say(f"tiers need --impala-mode enforce; none in mode {settings.mode.value}")
        return 0.0
    if engine_args.kv_transfer_config is not None or getattr(engine_args, "kv_offloading_size", None):
        say("your own KV connector is used; impala schedules above it and adds no tiers")
        return 0.0
    if tiers.host_gib is not None:
        if tiers.host_gib:
            _check_room(engine_args, tiers.host_gib, "tiers.host_gib")
        return tiers.host_gib
    if tiers.nvme_path is None and not _moves_kv():
        return 0.0  # on a CPU KV lives in host memory already
    found = _auto_gib(engine_args)
    if tiers.nvme_path is not None:
        size_gib = max(STAGING_GIB, found or 0.0)
        _check_room(engine_args, size_gib, "tiers.nvme_path, without tiers.host_gib")
        return size_gib
    if found is None or found < MIN_AUTO_GIB:
        why = f"there is no {SHM}" if found is None else f"{found:.1f} GiB of shared memory to spare"
        say(f"no host tier: {why}; give --impala-host-gib G, or 0 to be silent")
        return 0.0
    return found


def _connector(size_gib: float, settings: Config) -> Any:
    from vllm.config import KVTransferConfig

    tiers = settings.tiers
    ours = {
        "nvme_path": str(Path(tiers.nvme_path).expanduser().absolute()) if tiers.nvme_path is not None else None,
        "nvme_bytes": int(tiers.nvme_gib * GIB),
        "host_bytes_per_s": tiers.host_bytes_per_s,
        "nvme_read_bytes_per_s": tiers.nvme_read_bytes_per_s,
        "nvme_write_bytes_per_s": tiers.nvme_write_bytes_per_s,
        "kv_format": tiers.kv_format.value,
        "swap": tiers.swap.value,
    }
    return KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config={
            "spec_name": "ImpalaOffloadingSpec",
            "spec_module_path": "impala_vllm.adapters.vllm.offload_spec",
            "cpu_bytes_to_use": int(size_gib * GIB),
            "offload_prompt_only": False,
            EXTRA_KEY: ours,
        },
    )


def _finish(config: Any, settings: Config, say: Callable[[str], None]) -> None:
    """What only the finished configuration knows. Raises ConfigError where FP8 would damage what is no KV."""
    if settings.tiers.kv_format is KvFormat.FP8 and config.model_config.has_inner_state:
        raise ConfigError("tiers.kv_format fp8 is for KV; this model keeps a state beside it or instead: use exact")
    extra = config.kv_transfer_config.kv_connector_extra_config
    extra["blocks_per_chunk"] = max(1, CHUNK_TOKENS // (config.cache_config.block_size or CHUNK_TOKENS))
    # Sizes and caps are this machine's; every data-parallel rank on it makes tiers of its own.
    num_ranks = max(1, config.parallel_config.data_parallel_size_local)
    extra["cpu_bytes_to_use"] //= num_ranks
    ours = extra[EXTRA_KEY]
    ours["nvme_bytes"] //= num_ranks
    for cap in ("host_bytes_per_s", "nvme_read_bytes_per_s", "nvme_write_bytes_per_s"):
        if ours[cap] is not None:
            ours[cap] /= num_ranks
    if settings.tiers.nvme_path is not None:
        ours["identity"] = model_identity.identity(config, say)


def _check_nvme_is_near(config: Any, settings: Config) -> None:
    """Raise ConfigError where a worker may not share the scheduler's memory: its part of a row would be another's.

    Each host has a region of its own. A row that is read from NVMe lands in the scheduler's, and with it the parts that
    workers elsewhere load from theirs.
    """
    where = _elsewhere(config.parallel_config)
    if settings.tiers.nvme_path is not None and where is not None:
        raise ConfigError(
            f"tiers.nvme_path {settings.tiers.nvme_path}: {where}, and NVMe is read into one host's memory; "
            "drop --impala-nvme-path (--impala-host-gib G, the same on every host, works), or keep each replica on one "
            "host with --distributed-executor-backend mp"
        )


def _elsewhere(parallel: Any) -> str | None:
    """Why workers of one engine may run on several hosts; None: they do not."""
    if parallel.nnodes_within_dp > 1:
        return f"a replica spans {parallel.nnodes_within_dp} nodes"
    backend = parallel.distributed_executor_backend
    if backend in (None, "mp", "uni") or (backend == "external_launcher" and parallel.world_size == 1):
        return None
    name = backend if isinstance(backend, str) else backend.__name__
    return f"the {name} executor may place workers on several hosts"


def _reason_against(config: Any, settings: Config) -> str | None:
    if config.model_config.is_encoder_decoder:
        return "vLLM's connectors refuse encoder-decoder models"
    if config.model_config.runner_type != "generate":
        return "the model does not generate"
    if not config.cache_config.enable_prefix_caching:
        return "prefix caching is off, so blocks have no hashes"
    where = _elsewhere(config.parallel_config)
    if where is not None and settings.tiers.host_gib is None and settings.tiers.nvme_path is None:
        return f"{where}, whose free memory may differ; give --impala-host-gib G, the same on every host"
    return None


def _auto_gib(engine_args: Any) -> float | None:
    """A share of what is free for us; None: there is no shared memory."""
    shm = _shm_gib()
    if shm is None:
        return None
    num_ranks = engine_args.data_parallel_size_local or engine_args.data_parallel_size
    num_used = engine_args.tensor_parallel_size * engine_args.pipeline_parallel_size * num_ranks
    share = min(FREE_SHARE, MACHINE_SHARE * num_used / max(1, accelerators.count()))
    limited = free_memory.of_container()
    free = [free_memory.of_machine() / GIB * share] + ([limited / GIB * FREE_SHARE] if limited is not None else [])
    return min(*free, shm * SHM_SHARE)


def _shm_gib() -> float | None:
    """Room where vLLM makes the host tier; None: there is no such place."""
    try:
        shm = os.statvfs(SHM)
    except OSError:
        return None
    return shm.f_bavail * shm.f_frsize / GIB


def _check_room(engine_args: Any, size_gib: float, key: str) -> None:
    """Raise ConfigError where the host tier that was asked for cannot be made."""
    platform = _platform()
    if not (_moves_kv() or platform.is_cpu()):
        raise ConfigError(
            f"{key}: vLLM moves KV to host memory on CUDA, ROCm and XPU, and impala on CPUs; this platform is "
            f"{platform.device_name}: drop --impala-host-gib and --impala-nvme-path"
        )
    if not _is_first(engine_args) or engine_args.data_parallel_size_local == 0:
        return  # the engines have the room already, or are elsewhere
    shm = _shm_gib()
    if shm is None:
        raise ConfigError(f"{key}: {SHM} is not there, and the host tier lies in it; mount a tmpfs, or drop the tiers")
    if size_gib > shm:
        raise ConfigError(
            f"{key}: {SHM} has {shm:.2f} GiB to spare, not {size_gib:g}; lower it, "
            "or give the container more with --shm-size or --ipc=host"
        )


def _is_first(engine_args: Any) -> bool:
    """Of the front-end processes, the one that starts before the engines have taken their memory."""
    return engine_args._api_process_rank == -1 or engine_args._api_process_count == 1


def _moves_kv() -> bool:
    """vLLM's own workers can copy between device and host here."""
    return _platform().is_cuda_alike() or _platform().is_xpu()


def _platform() -> Any:
    from vllm.platforms import current_platform

    return current_platform

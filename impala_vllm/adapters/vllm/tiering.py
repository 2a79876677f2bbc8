"""Whether a server gets tiers below HBM, and how large: what becomes of vLLM's KV transfer configuration.

A connector of the user's own always wins. Without one, and with policy on, the host tier is sized from free memory
unless a size was given; where vLLM cannot have a connector the tiers are left out with one line.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from impala_vllm.config import Config, ConfigError, KvFormat, Mode

FREE_SHARE = 0.25
"""Of free memory, for the host tier: what else the machine runs is unknown."""
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
        reason = _reason_against(config)
    except (ValueError, AssertionError, NotImplementedError, RuntimeError) as e:
        if settings.tiers.host_gib is not None:
            raise
        config, reason = None, str(e).splitlines()[0][:200]
    if reason is None:
        _finish(config, settings)
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
        return tiers.host_gib
    if tiers.nvme_path is not None:
        return max(STAGING_GIB, _auto_gib())
    if _is_cpu():
        return 0.0  # KV lives in host memory already
    found = _auto_gib()
    if found < MIN_AUTO_GIB:
        say(f"no host tier: {found:.1f} GiB of shared memory to spare; give --impala-host-gib G, or 0 to be silent")
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


def _finish(config: Any, settings: Config) -> None:
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
        ours["identity"] = _identity(config)


def _reason_against(config: Any) -> str | None:
    if config.model_config.is_encoder_decoder:
        return "vLLM's connectors refuse encoder-decoder models"
    if config.model_config.runner_type != "generate":
        return "the model does not generate"
    if not config.cache_config.enable_prefix_caching:
        return "prefix caching is off, so blocks have no hashes"
    return None


def _identity(config: Any) -> str:
    """Digest of model, weights and hash scheme: KV of another is not ours, whatever its hashes say."""
    import vllm

    model = config.model_config
    algorithm = config.cache_config.prefix_caching_hash_algo
    seed = os.environ.get("PYTHONHASHSEED")
    if seed is None and algorithm.startswith("xxhash"):
        seed = os.urandom(8).hex()  # vLLM draws one a process: nothing outlives it
    parts = [
        vllm.__version__,
        model.model,
        model.revision,
        getattr(model.hf_config, "_commit_hash", None),  # a hub name without a revision means another one tomorrow
        model.quantization,
        str(model.hf_config.to_json_string()) if hasattr(model.hf_config, "to_json_string") else "",
        _weights(Path(model.model)),
        algorithm,
        seed,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _weights(model: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of local weight files; empty for a hub name, which its commit names."""
    found = [p for p in (model, *sorted(model.glob("*"))) if p.suffix in (".safetensors", ".bin", ".pt", ".gguf")]
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in found if p.is_file()]


def _auto_gib() -> float:
    import psutil

    free = psutil.virtual_memory().available * FREE_SHARE
    try:
        shm = os.statvfs("/dev/shm")
    except OSError as e:
        raise ConfigError(f"/dev/shm: {e.strerror}; mount it, or give --impala-host-gib 0") from e
    return min(free, shm.f_bavail * shm.f_frsize * SHM_SHARE) / GIB


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()

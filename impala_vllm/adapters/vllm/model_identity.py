"""What tells one model's KV from another's after a restart: configuration, weights, hash scheme.

vLLM's block hashes name tokens, not weights. Where nothing here names the weights, KV does not outlive the process:
a wrong guess would be wrong tokens.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHT_SUFFIXES = frozenset((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".tensors"))
ELSEWHERE = frozenset(("tensorizer", "modelexpress", "ipc_cache"))
"""Load formats whose weights need not lie where the model does."""


def identity(config: Any, say: Callable[[str], None]) -> str:
    """Digest of a finished VllmConfig; a random one, said once, where KV of this process means nothing to the next."""
    import vllm

    model = config.model_config
    algorithm = config.cache_config.prefix_caching_hash_algo
    seed = os.environ.get("PYTHONHASHSEED")
    weights = _weight_files(Path(model.model))
    unknown = None
    if seed is None and algorithm.startswith("xxhash"):
        # vLLM draws one a process: nothing outlives it.
        unknown = f"{algorithm} hashes differ from process to process; set PYTHONHASHSEED"
    elif not _is_named(config, weights):
        unknown = "nothing tells these weights from others; serve a local directory of them, or a hub name"
    if unknown is not None:
        say(f"what is on NVMe does not survive a restart: {unknown}")
    parts = [
        vllm.__version__,
        model.model,
        model.revision,
        _commit(model),
        model.quantization,
        str(model.hf_config.to_json_string()) if hasattr(model.hf_config, "to_json_string") else "",
        config.load_config.load_format,
        weights,
        algorithm,
        seed,
        os.urandom(8).hex() if unknown is not None else None,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_named(config: Any, weights: list[tuple[str, int, int]]) -> bool:
    """Would other weights have another identity?"""
    # Of a model in object storage vLLM has only the configuration here.
    if getattr(config.model_config, "model_weights", "") or config.load_config.load_format in ELSEWHERE:
        return False
    return bool(weights) or _commit(config.model_config) is not None


def _commit(model: Any) -> str | None:
    """Of a hub model: a name without a revision means another one tomorrow. None: not known."""
    commit = getattr(model.hf_config, "_commit_hash", None)
    if commit is None and model.revision is not None and re.fullmatch("[0-9a-f]{40}", model.revision):
        return str(model.revision)
    return commit


def _weight_files(model: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of local weight files; empty for a hub name, which its commit names."""
    found = [p for p in (model, *sorted(model.rglob("*"))) if p.suffix in WEIGHT_SUFFIXES and p.is_file()]
    return [(str(p.relative_to(model)), p.stat().st_size, p.stat().st_mtime_ns) for p in found]

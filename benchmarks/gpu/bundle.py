"""What a machine without a network has to be given: vLLM and what else its Python lacks, unpacked beside the tree.

`.gpu/` may hold `vllm*.tar.xz` (a trimmed vLLM with its dependencies, ready to import) and wheels; see README.md.
"""

import importlib.util
import os
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = ROOT / ".gpu"
NEEDED = ("vllm", "torch", "yaml", "msgspec", "xxhash", "zstandard")


def unpack(source: Path, target: Path, say: Callable[[str], None]) -> None:
    """Unpack every archive of `source` into `target`. One that is damaged is named and left out."""
    archives = sorted((*source.glob("*.tar.xz"), *source.glob("*.whl")))
    if not archives:
        say(f"bundle: nothing in {source.name}/; what this Python has must do")
    for archive in archives:
        try:
            if archive.suffix == ".whl":
                with zipfile.ZipFile(archive) as wheel:
                    wheel.extractall(target)
            else:
                with tarfile.open(archive) as bundle:
                    bundle.extractall(target, filter="data")
        except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as e:
            say(f"bundle: {archive.name} cannot be unpacked ({type(e).__name__}: {e})")
        else:
            say(f"bundle: {archive.name} unpacked")


def missing(site: Path) -> list[str]:
    """What engine steps need and will find neither in `site` nor installed, "vllm" first."""
    places = [str(site), *sys.path]
    return [name for name in NEEDED if PathFinder.find_spec(name, places) is None]


def environment(
    base: Mapping[str, str], site: Path | None, scratch: Path, *, rehearsal: bool, commit: str | None, command: str
) -> dict[str, str]:
    """What steps run under: the bundle before the tree before what was there, and a vLLM that asks nobody."""
    places = [str(p) for p in (site, ROOT) if p is not None]
    env = {
        **base,
        "PYTHONPATH": os.pathsep.join([*places, *filter(None, [base.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        # Tracebacks of the engine in the step's own log, and clean exits.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "IMPALA_CACHE_DIR": str(scratch / "cache"),
        "IMPALA_GPU_COMMAND": command,
        "IMPALA_GPU_SCRATCH": str(scratch),
    }
    if commit:
        env["IMPALA_GPU_COMMIT"] = commit
    if rehearsal:
        env |= {"IMPALA_GPU_REHEARSAL": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return env


def scratch() -> Path:
    """Where steps of this run may leave what no one fetches, such as models."""
    return Path(os.environ.get("IMPALA_GPU_SCRATCH") or "/tmp")


def reach_ops() -> None:
    """Make `impala_vllm.ops` importable from a tree where neither an installation nor a link put it there."""
    import impala_vllm

    if importlib.util.find_spec("impala_vllm.ops") is None:
        impala_vllm.__path__.append(str(ROOT / "kernels"))

"""The servers a comparison compares: the same vLLM, one thing different.

An arm is data. To add one, add an entry to `ARMS`; everything that is not its difference (model,
pool, block size, forced replay) comes from `Machine` and is the same for all.
"""

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from impala_vllm.replay.server import Server

FORCED_REPLAY = "impala_vllm.adapters.vllm.forced_replay:ForcedReplay"


@dataclass(frozen=True, slots=True)
class Machine:
    """What every arm of a comparison has in common."""

    model: Path
    hbm_blocks: int = 384
    """Pool of KV blocks: 12,288 tokens, a quarter of the default workload's working set."""
    unbounded_blocks: int = 4000
    """A pool in which the workload never evicts."""
    block_size: int = 32
    max_model_len: int = 8192
    dtype: str = field(default_factory=lambda: fast_dtype())
    kv_space_gib: int = 2
    """VLLM_CPU_KVCACHE_SPACE; has to hold `unbounded_blocks`."""
    extra_args: tuple[str, ...] = ()

    def describe(self) -> str:
        tokens = self.hbm_blocks * self.block_size
        return (
            f"model {self.model.name}, {self.dtype}, HBM pool {self.hbm_blocks} blocks of {self.block_size} "
            f"= {tokens:,} tokens, context {self.max_model_len:,}{''.join(f' {a}' for a in self.extra_args)}"
        )


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to serve."""

    name: str
    description: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    config: Mapping[str, Mapping[str, object]] = field(default_factory=dict[str, Mapping[str, object]])
    """What its `--impala-config` file says; none is written where this is empty."""
    unbounded: bool = False
    """Give it the pool that never evicts."""
    recognises: bool = False
    """Answers /impala/traces, so its identity can be scored."""


def _enforcing(name: str, description: str, *off: str) -> Arm:
    """impala that decides, without the named policies."""
    args = ("--scheduler", "impala", "--impala-mode", "enforce")
    return Arm(name, description, args, config={policy: {"enabled": False} for policy in off}, recognises=True)


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("stock", "vLLM as it comes: prefix caching, first come first served"),
        Arm(
            "unbounded",
            "stock vLLM with a KV pool that never evicts: the limit of what caching can do",
            unbounded=True,
        ),
        Arm(
            "impala-off",
            "impala selected and switched off: must behave as stock",
            ("--scheduler", "impala", "--impala-mode", "off"),
        ),
        Arm(
            "impala-observe",
            "impala recognises traces and measures; decides nothing",
            ("--scheduler", "impala", "--impala-mode", "observe"),
            recognises=True,
        ),
        _enforcing(
            "impala-identity",
            "impala enforces with every policy off: first come first served, KV evicted trace by trace",
            "rank",
            "admission",
            "retention",
        ),
        _enforcing("impala-rank", "impala decides the order only", "admission", "retention"),
        _enforcing(
            "impala-rank-admission",
            "impala decides order and admission; the longest silent trace's KV goes first",
            "retention",
        ),
        _enforcing("impala-enforce", "impala decides: rank, admission and retention on HBM"),
    )
}


def fast_dtype() -> str:
    """bfloat16 where the processor has wide registers for it; on AVX2 float32 prefills many times faster.

    Measured on 2 AVX2 cores with the 26 M model: bfloat16 100 tokens/s, float32 over 1,000.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "bfloat16"
    return "bfloat16" if "avx512f" in flags or "x86" not in platform.machine() else "float32"


def pick(names: str) -> list[Arm]:
    """Arms by a comma-separated list. Raises ValueError with one line."""
    unknown = [n for n in names.split(",") if n not in ARMS]
    if unknown:
        raise ValueError(f"unknown arm {unknown[0]!r}; known: {', '.join(ARMS)}")
    return [ARMS[n] for n in names.split(",")]


def server(arm: Arm, machine: Machine, log_dir: Path) -> Server:
    """A server of this arm, not yet started. Its log and configuration are `log_dir`/NAME.log and .yaml."""
    env = {
        "VLLM_CPU_KVCACHE_SPACE": str(machine.kv_space_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **arm.env,
    }
    line = command(arm, machine)
    if arm.config:
        path = log_dir / f"{arm.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({k: dict(v) for k, v in arm.config.items()}), encoding="utf-8")
        line += ["--impala-config", str(path)]
    return Server(arm.name, line, log_dir / f"{arm.name}.log", env)


def command(arm: Arm, machine: Machine) -> list[str]:
    """The command line, with `{port}` where the port goes."""
    blocks = machine.unbounded_blocks if arm.unbounded else machine.hbm_blocks
    return [
        sys.executable,
        *("-m", "vllm.entrypoints.cli.main", "serve", str(machine.model)),
        *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", "{port}"),
        *("--enforce-eager", "--dtype", machine.dtype),
        *("--block-size", str(machine.block_size), "--num-gpu-blocks-override", str(blocks)),
        *("--max-model-len", str(machine.max_model_len)),
        "--enable-prompt-tokens-details",
        *("--logits-processors", FORCED_REPLAY),
        *arm.args,
        *machine.extra_args,
    ]

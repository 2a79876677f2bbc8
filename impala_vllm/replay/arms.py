"""The servers a comparison compares: the same vLLM, one thing different.

An arm is data. To add one, add an entry to `ARMS`; everything that is not its difference (model,
pool, block size, forced replay) comes from `Machine` and is the same for all.
"""

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from impala_vllm.replay.server import Server

FORCED_REPLAY = "impala_vllm.adapters.vllm.forced_replay:ForcedReplay"
SWITCHED = "impala_vllm.adapters.vllm.switched.Scheduler"

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Room:
    """Tiers below HBM, for the arms that have some: sizes are shares of HBM, rates in tokens' KV."""

    host_share: float = 1.0
    nvme_share: float = 8.0
    """vLLM's fs tier knows no limit."""
    host_tokens_per_s: float | None = None
    """Cap of each direction; None: none."""
    nvme_tokens_per_s: float | None = None

    def describe(self) -> str:
        def cap(rate: float | None) -> str:
            return "uncapped" if rate is None else f"{rate:,.0f} tokens/s"

        host, nvme = cap(self.host_tokens_per_s), cap(self.nvme_tokens_per_s)
        return f"host {self.host_share:g}x HBM ({host}), NVMe {self.nvme_share:g}x ({nvme})"


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
    room: Room = field(default_factory=Room)

    def kv_bytes_per_token(self) -> int:
        """Of all layers, as the model's config.json says."""
        shape = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
        heads = shape.get("num_key_value_heads") or shape["num_attention_heads"]
        head_dim = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
        return 2 * shape["num_hidden_layers"] * heads * head_dim * (4 if self.dtype == "float32" else 2)

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
    tiers: str | None = None
    """Who manages tiers below HBM: `impala`, or vLLM's `lru` or `arc`; None: there are none."""
    has_nvme: bool = False
    engine: str | None = None
    """The engine it shares with other arms of the same command; None: its own."""
    salt_mark: str = ""
    """Ends the cache salt of its runs: how a shared engine tells whose turn it is."""


def _enforcing(name: str, description: str, *off: str) -> Arm:
    """impala that decides, without the named policies."""
    args = ("--scheduler", "impala", "--impala-mode", "enforce", "--impala-host-gib", "0")
    return Arm(name, description, args, config={policy: {"enabled": False} for policy in off}, recognises=True)


def _switched(name: str, description: str, salt_mark: str = "") -> Arm:
    return Arm(name, description, ("--scheduler-cls", SWITCHED), engine="switched", salt_mark=salt_mark)


def _tiered(name: str, description: str, has_nvme: bool = True, **config: Mapping[str, bool]) -> Arm:
    """impala that decides over tiers too, with the switches as given."""
    args = ("--scheduler", "impala", "--impala-mode", "enforce")
    return Arm(name, description, args, config=config, recognises=True, tiers="impala", has_nvme=has_nvme)


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
        _switched("switched-stock", "an engine of impala's that serves this run as stock vLLM", salt_mark="-stock"),
        _switched("switched-impala", "the same engine, and impala decides"),
        Arm("stock-lru", "stock with vLLM's offloading to host, least recently used goes first", tiers="lru"),
        Arm("stock-arc", "stock with vLLM's offloading to host under ARC", tiers="arc"),
        Arm("stock-lru-fs", "the same with LRU and vLLM's fs tier on disk", tiers="lru", has_nvme=True),
        Arm("stock-arc-fs", "the same with ARC and vLLM's fs tier on disk", tiers="arc", has_nvme=True),
        _tiered("impala-host", "impala with a host tier", has_nvme=False),
        _tiered("impala-tiers", "impala with host and NVMe tiers"),
        _tiered("impala-tiers-no-gate", "that, but everything is written to NVMe", planner={"gate_writes": False}),
        _tiered(
            "impala-tiers-no-choice", "that, but what a tier has is always loaded", planner={"choose_loads": False}
        ),
        _tiered("impala-tiers-no-admission", "that, but everybody is admitted", admission={"enabled": False}),
        _tiered(
            "impala-tiers-no-retention",
            "that, but HBM gives up the KV of the longest silent trace first",
            retention={"enabled": False},
        ),
        _tiered(
            "impala-tiers-no-supersession",
            "that, but what a turn no longer uses stays as long as its trace does",
            retention={"supersede": False},
        ),
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
    config = {name: dict(values) for name, values in arm.config.items()}
    if arm.tiers == "impala":
        config["tiers"] = _our_tiers(arm, machine, log_dir)
    elif arm.tiers is not None:
        line += ["--kv-transfer-config", json.dumps(_upstream_tiers(arm, machine, log_dir))]
    if config:
        path = log_dir / f"{arm.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        line += ["--impala-config", str(path)]
    return Server(arm.name, line, log_dir / f"{arm.name}.log", env)


def disk(arm: Arm, log_dir: Path) -> Path:
    """The directory of its NVMe tier."""
    return log_dir / f"{arm.name}-{'nvme' if arm.tiers == 'impala' else 'fs'}"


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


def _our_tiers(arm: Arm, machine: Machine, log_dir: Path) -> dict[str, Any]:
    room, per_token, hbm_bytes = machine.room, machine.kv_bytes_per_token(), _hbm_bytes(machine)
    tiers: dict[str, Any] = {"host_gib": room.host_share * hbm_bytes / GIB}
    if room.host_tokens_per_s is not None:
        tiers["host_bytes_per_s"] = room.host_tokens_per_s * per_token
    if arm.has_nvme:
        tiers |= {"nvme_path": str(disk(arm, log_dir)), "nvme_gib": room.nvme_share * hbm_bytes / GIB}
        if room.nvme_tokens_per_s is not None:
            rate = room.nvme_tokens_per_s * per_token
            tiers |= {"nvme_read_bytes_per_s": rate, "nvme_write_bytes_per_s": rate}
    return tiers


def _upstream_tiers(arm: Arm, machine: Machine, log_dir: Path) -> dict[str, Any]:
    room, per_token = machine.room, machine.kv_bytes_per_token()
    extra: dict[str, Any] = {
        "spec_name": "UpstreamSpec",
        "spec_module_path": "impala_vllm.adapters.vllm.upstream_spec",
        "cpu_bytes_to_use": int(room.host_share * _hbm_bytes(machine)),
        "eviction_policy": arm.tiers,
        "offload_prompt_only": False,
    }
    if room.host_tokens_per_s is not None:
        extra["host_bytes_per_s"] = room.host_tokens_per_s * per_token
    if arm.has_nvme:
        fs: dict[str, Any] = {"type": "fs", "root_dir": str(disk(arm, log_dir))}
        if room.nvme_tokens_per_s is not None:
            fs |= {
                "type": "PacedFs",
                "module_path": "impala_vllm.adapters.vllm.upstream_spec",
                "bytes_per_s": room.nvme_tokens_per_s * per_token,
            }
        extra["secondary_tiers"] = [fs]
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def _hbm_bytes(machine: Machine) -> int:
    return machine.hbm_blocks * machine.block_size * machine.kv_bytes_per_token()

"""Recorded sessions on a real engine of real shape: stock, stock with vLLM's offloading, impala, with the same bytes.

Each arm is a step with an engine of its own. The load is sized by a guess at the engine's speed, the same for all arms.
"""

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import bundle, device, shapes, smoke, traces
from benchmarks.gpu.engine import GIB, Sender, Setting, mover, scrape, start
from benchmarks.gpu.out import Out
from benchmarks.gpu.shapes import Shape
from impala_vllm.replay import counters
from impala_vllm.replay.load import Load, Run, drive
from impala_vllm.replay.measures import Measures, measure
from impala_vllm.replay.plan import Plan, PlannedTurn

PREFILL_S = {"1b": 40.0, "8b": 15.0}
"""Priors: with gaps and decoding, stock then takes a minute and a half and half a minute at most. `--prefill-s` changes
them."""
OVERSUBSCRIPTION = 4.0
HOST_SHARE = 2.0
"""Of the HBM pool."""
FIGURES = {
    "tasks_per_hour": ("/h", "higher"),
    "makespan_s": ("s", "lower"),
    "jct_mean_s": ("s", "lower"),
    "jct_p95_s": ("s", "lower"),
    "stall_mean_s": ("s", "lower"),
    "stall_p95_s": ("s", "lower"),
    "resume_ttft_p50_s": ("s", "lower"),
    "resume_ttft_p95_s": ("s", "lower"),
    "output_tokens_per_s": ("tokens/s", "higher"),
    "cached_share": ("", "higher"),
    "hit_bound": ("", "-"),
    "computed_tokens": ("tokens", "lower"),
    "recomputed_tokens": ("tokens", "lower"),
    "num_failed": ("", "lower"),
}


@dataclass(frozen=True, slots=True)
class Pool:
    """How large the tiers are for a plan."""

    num_blocks: int
    max_model_len: int
    host_bytes: int

    @classmethod
    def of(cls, plan: Plan, shape: Shape, block_size: int, most_host_bytes: int) -> "Pool":
        """HBM for a quarter of the working set, and for its longest turn; host memory for twice that."""
        longest = max(len(t.prompt) + len(t.output) for _, _, t in plan.turns())
        tokens = max(plan.working_set_tokens() / OVERSUBSCRIPTION, longest * 1.1)
        # One more: vLLM keeps a block of zeros for itself.
        num_blocks = int(-(-tokens // block_size)) + 1
        host_bytes = int(HOST_SHARE * num_blocks * block_size * shape.kv_bytes_per_token)
        return cls(num_blocks, -(-(longest + 1) // block_size) * block_size, min(host_bytes, most_host_bytes))


def run(out: Out, shape: str, arm: str) -> None:
    """Replay, record, and say the headline."""
    kind = shapes.SHAPES["small" if device.is_rehearsal() else shape]
    model = shapes.write(kind, bundle.scratch())
    words = shapes.vocabulary(model)
    prefill_s = 0.5 if device.is_rehearsal() else float(os.environ.get("IMPALA_GPU_PREFILL_S") or PREFILL_S[shape])
    context = 1024 if device.is_rehearsal() else shapes.MAX_TOKENS
    log = Path(found) if (found := os.environ.get("IMPALA_GPU_TRACES")) else None
    count = 3 if device.is_rehearsal() else traces.NUM_SESSIONS
    began = time.monotonic()
    load = traces.sessions(traces.Room(context, kind.prefill_tokens_per_s, prefill_s), words, log, count)
    block_size = 32 if device.is_rehearsal() else 16
    pool = Pool.of(load.plan, kind, block_size, smoke.host_bytes())
    out.line(
        f"{load.source}, {load.scale}: {len(load.plan.roots())} tasks, {load.plan.num_turns()} requests, "
        f"{load.plan.prompt_tokens():,} prompt tokens; lowered in {time.monotonic() - began:.0f} s"
    )
    mode = smoke.known_mode(out)
    setting = Setting(
        model, pool.num_blocks, pool.max_model_len, pool.host_bytes, mode, block_size=block_size
    )  # fmt: skip
    began = time.monotonic()
    llm = start(arm, setting)
    out.line(
        f"{kind.parameters / 1e9:.1f} B parameters, HBM pool of {pool.num_blocks} blocks, host "
        f"{pool.host_bytes / GIB:.1f} GiB, {mode.describe()}, "
        f"KV moved by {mover()}: up after {time.monotonic() - began:.0f} s"
    )
    measured = asyncio.run(_replay(out, llm, load.plan, words, pool, block_size))
    _record(out, shape, arm, kind, setting, load, measured)


async def _replay(out: Out, llm: Any, plan: Plan, words: Any, pool: Pool, block_size: int) -> Measures:
    async with Sender(llm) as sender:
        length = min(pool.max_model_len - 32, 8192)
        for name in ("warm-up", "timed"):
            turn = PlannedTurn(name, words.text(name, length), words.text(f"{name} out", 2), 0.0)
            answer = await sender.send(turn, name, name)
            if answer.error is not None:
                raise RuntimeError(f"the first request failed: {answer.error}")
        seconds = answer.ttft_s or answer.end_s - answer.start_s
        out.line(f"prefill of {length} tokens: {length / seconds:,.0f} tokens/s")
        llm.llm_engine.reset_prefix_cache(False, True)
        before = scrape()
        run_of: Run = await drive(plan, sender, Load(spread_s=5.0))
        computed = counters.computed_tokens(before, scrape())
    errors = sorted({r.error for r in run_of.results if r.error is not None})
    for error in errors[:3]:
        out.line(f"failed: {error}")
    return measure(run_of, computed_tokens=computed, new_tokens=plan.new_tokens(block_size))


def _record(
    out: Out, shape: str, arm: str, kind: Shape, setting: Setting, load: traces.Sessions, measured: Measures
) -> None:
    params = {
        "log": load.source,
        "tasks": len(load.plan.roots()),
        "requests": load.plan.num_turns(),
        "prompt tokens": load.plan.prompt_tokens(),
        "working set": f"{load.plan.working_set_tokens()} tokens",
        "scale": load.scale,
        "load": "closed loop, whole batch, starts over 5 s; in process, no HTTP",
        "engine": f"Qwen3 of {kind.parameters / 1e9:.1f} B random parameters, {setting.mode.describe()}, HBM pool "
        f"{setting.num_blocks} blocks of {setting.block_size}, context {setting.max_model_len}",
        "host tier": f"{setting.host_bytes / GIB:.2f} GiB, for arms that have one",
        "sessions cut": load.plan.num_capped_sessions,
    }
    for name, (unit, better) in FIGURES.items():
        value = getattr(measured, name)
        if value is not None:
            out.figure(f"serving/gpu-sessions-{shape}", arm, name, unit, [float(value)], better=better, **params)
    out.line(
        f"{measured.tasks_per_hour:,.0f} tasks/h, makespan {measured.makespan_s:.1f} s, stall "
        f"{measured.stall_mean_s:.2f} s of a JCT of {measured.jct_mean_s:.2f} s, cached {measured.cached_share:.2f} of "
        f"at most {measured.hit_bound or 0:.2f}, {measured.num_failed} failed"
    )

"""The experiments, as data: which load on which arms, how often, and which figures are the answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from impala_vllm import workload
from impala_vllm.replay import recording, synthetic
from impala_vllm.replay.load import Arrivals, Load
from impala_vllm.replay.lowering import Scale, lower
from impala_vllm.replay.plan import Plan
from impala_vllm.replay.vocabulary import Vocabulary
from impala_vllm.workload import WorkloadError

BASELINE_FIGURES = (
    "tasks_per_hour",
    "makespan_s",
    "jct_mean_s",
    "jct_p95_s",
    "stall_mean_s",
    "stall_p95_s",
    "resume_ttft_p50_s",
    "resume_ttft_p95_s",
    "cached_share",
    "hit_bound",
    "computed_tokens",
    "recomputed_tokens",
    "cpu_s",
)
COST_FIGURES = ("requests_per_s", "output_tokens_per_s", "makespan_s", "stall_mean_s", "cpu_s")


@dataclass(frozen=True, slots=True)
class Source:
    """Where the load of an experiment comes from, as the command line says."""

    traces: Path
    seed: int
    vocabulary: Vocabulary
    num_sessions: int | None = None


@dataclass(frozen=True, slots=True)
class Experiment:
    """One question to a real engine."""

    name: str
    arms: tuple[str, ...]
    plan: Callable[[Source, "Experiment"], Plan]
    figures: tuple[str, ...]
    """Fields of `Measures` to record per arm."""
    ratios: tuple[str, ...] = ()
    """Fields to compare with the first arm, pair by pair."""
    num_sessions: int = 16
    scale: Scale = field(default_factory=Scale)
    load: Load = field(default_factory=Load)
    num_pairs: int = 1
    fresh_engines: bool = False
    machine: dict[str, Any] = field(default_factory=dict[str, Any])
    """What differs from the defaults of `arms.Machine`."""


def agent_sessions(source: Source, experiment: Experiment) -> Plan:
    """Recorded sessions, lowered. The bundled log holds fewer: then all of it."""
    scale = experiment.scale
    bundled = source.traces == recording.bundled()
    turns = recording.choose(
        source.traces,
        None if bundled else (source.num_sessions or experiment.num_sessions),
        min_turns=1 if bundled else (scale.num_turns or 2),
        # Leaves room for the outputs, which shrink less than prompts.
        max_input_tokens=int(scale.max_context_tokens * scale.prompt * 0.9),
        seed=source.seed,
    )
    return lower(turns, scale, source.vocabulary, source.seed)


def single_requests(source: Source, experiment: Experiment) -> Plan:
    """The first lengths of a log as prompts that share nothing."""
    scale = experiment.scale
    count = source.num_sessions or experiment.num_sessions
    lengths = [
        (
            min(max(1, t.input_tokens // scale.prompt), scale.max_context_tokens - scale.max_output_tokens),
            min(max(scale.min_output_tokens, (t.output_tokens or 0) // scale.output), scale.max_output_tokens),
        )
        for t in islice(workload.read(source.traces), count)
    ]
    if not lengths:
        raise WorkloadError(f"{source.traces}: no request in it; give another log")
    return synthetic.independent(source.vocabulary, lengths, seed=source.seed)


def forks(source: Source, experiment: Experiment) -> Plan:
    """Synthetic parents with eight forks each."""
    return synthetic.fan_out(
        source.vocabulary, num_parents=source.num_sessions or experiment.num_sessions, seed=source.seed
    )


def jobs(source: Source, experiment: Experiment) -> Plan:
    """Synthetic labelling jobs."""
    return synthetic.labelling(
        source.vocabulary, num_jobs=source.num_sessions or experiment.num_sessions, seed=source.seed
    )


_ROOMY = {"hbm_blocks": 6000, "max_model_len": 32_768}
"""Identity and overhead are asked for here, not eviction: everything fits."""

EXPERIMENTS: dict[str, Experiment] = {
    e.name: e
    for e in (
        Experiment(
            "baseline",
            ("stock", "unbounded", "impala-observe"),
            agent_sessions,
            BASELINE_FIGURES,
            ("tasks_per_hour", "stall_mean_s", "jct_mean_s"),
            scale=Scale(num_turns=10),
        ),
        Experiment(
            "link-f1",
            ("impala-observe",),
            agent_sessions,
            ("makespan_s", "cached_share", "hit_bound", "recomputed_tokens"),
            # Short gaps only shorten the run: which turn follows which does not change.
            scale=Scale(gap=30.0, max_gap_s=3.0, max_context_tokens=32_768),
            machine=_ROOMY,
        ),
        Experiment(
            "observe-cost-agent",
            ("stock", "impala-observe"),
            agent_sessions,
            COST_FIGURES,
            ("requests_per_s", "cpu_s"),
            # Next to no gaps: an engine that waits for tools hides what anything costs.
            scale=Scale(num_turns=10, gap=600.0, max_gap_s=0.05),
            load=Load(spread_s=0.5),
            num_pairs=6,
            machine={"hbm_blocks": 4000},
        ),
        Experiment(
            "observe-cost-azure",
            ("stock", "impala-observe"),
            single_requests,
            COST_FIGURES,
            ("requests_per_s", "cpu_s"),
            num_sessions=300,
            scale=Scale(prompt=8, output=8),
            load=Load(Arrivals.STEADY, concurrency=32),
            num_pairs=6,
        ),
        Experiment(
            "fan-out",
            ("stock", "unbounded", "impala-observe"),
            forks,
            BASELINE_FIGURES,
            num_sessions=4,
        ),
        Experiment(
            "labelling",
            ("stock", "impala-observe"),
            jobs,
            COST_FIGURES,
            ("requests_per_s",),
            num_sessions=1000,
            load=Load(Arrivals.STEADY, concurrency=64),
        ),
    )
}

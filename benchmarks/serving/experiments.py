"""The experiments, as data: which load on which arms, how often, and which figures are the answer."""

from typing import Any

from benchmarks.serving import plans
from benchmarks.serving.experiment import Experiment
from impala_vllm.replay.load import Arrivals, Load
from impala_vllm.replay.lowering import Scale

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
AGENT_FIGURES = (*BASELINE_FIGURES, "stall_p99_s")
AGENT_RATIOS = ("tasks_per_hour", "stall_mean_s", "stall_p95_s", "jct_mean_s")
COST_FIGURES = ("requests_per_s", "output_tokens_per_s", "makespan_s", "stall_mean_s", "cpu_s")

_PAIR = ("stock", "impala-enforce")
_ONE_ENGINE = ("switched-stock", "switched-impala")
_QUARTERS = tuple(f"stall_mean_s of {name}" for name in ("short-gaps", "long-gaps", "single-requests", "fan-outs"))
_SHORT = ("jct_p95_s of short-alone", "jct_p95_s of short-beside-long")

_ROOMY = {"hbm_blocks": 6000, "max_model_len": 32_768}
"""Identity and overhead are asked for here, not eviction: everything fits."""

_GPU_LINKS, _SLOW_LINKS = (12.0, 2.0), (4.0, 0.7)
"""About an 8 B model on an H200 with PCIe 5 and one NVMe drive; and a machine whose disk is slower than its GPU."""


def _tiers(name: str, arms: tuple[str, ...], **more: Any) -> Experiment:
    """The load of `agents` on arms with tiers."""
    ratios = (*AGENT_RATIOS, "computed_tokens")
    return Experiment(
        name, arms, plans.agent_sessions, AGENT_FIGURES, ratios, scale=Scale(num_turns=10), num_pairs=5, **more
    )


def _crowd(name: str, max_num_seqs: int, arms: tuple[str, ...] = _PAIR) -> Experiment:
    """Many sessions at nearly what the engine can do, with room for all KV and so many running slots."""
    return Experiment(
        name,
        arms,
        plans.crowd,
        ("requests_per_s", *AGENT_FIGURES),
        (*AGENT_RATIOS, "stall_p99_s", "requests_per_s"),
        num_sessions=160,
        # Short gaps: it is compute that sessions wait for, neither tools nor KV.
        scale=Scale(num_turns=10, gap=60.0, max_gap_s=0.5),
        capacity_share=0.95,
        num_pairs=5,
        machine={"hbm_blocks": 6000, "extra_args": ("--max-num-seqs", str(max_num_seqs))},
    )


def _control(name: str, arms: tuple[str, ...], num_sessions: int, num_pairs: int) -> Experiment:
    """Single requests that share nothing."""
    return Experiment(
        name,
        arms,
        plans.plain_requests,
        COST_FIGURES,
        ("requests_per_s", "cpu_s"),
        num_sessions=num_sessions,
        scale=Scale(prompt=8, output=8),
        load=Load(Arrivals.STEADY, concurrency=32),
        num_pairs=num_pairs,
    )


EXPERIMENTS: dict[str, Experiment] = {
    e.name: e
    for e in (
        Experiment(
            "baseline",
            ("stock", "unbounded", "impala-observe"),
            plans.agent_sessions,
            BASELINE_FIGURES,
            ("tasks_per_hour", "stall_mean_s", "jct_mean_s"),
            scale=Scale(num_turns=10),
        ),
        Experiment(
            "link-f1",
            ("impala-observe",),
            plans.agent_sessions,
            ("makespan_s", "cached_share", "hit_bound", "recomputed_tokens"),
            # Short gaps only shorten the run: which turn follows which does not change.
            scale=Scale(gap=30.0, max_gap_s=3.0, max_context_tokens=32_768),
            machine=_ROOMY,
        ),
        Experiment(
            "observe-cost-agent",
            ("stock", "impala-observe"),
            plans.agent_sessions,
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
            plans.single_requests,
            COST_FIGURES,
            ("requests_per_s", "cpu_s"),
            num_sessions=300,
            scale=Scale(prompt=8, output=8),
            load=Load(Arrivals.STEADY, concurrency=32),
            num_pairs=6,
        ),
        Experiment(
            "fan-out",
            ("stock", "unbounded", "impala-observe", "impala-enforce"),
            plans.forks,
            BASELINE_FIGURES,
            ("makespan_s",),
            num_sessions=4,
            num_pairs=5,
        ),
        Experiment(
            "labelling",
            ("stock", "impala-observe", "impala-enforce"),
            plans.jobs,
            COST_FIGURES,
            ("requests_per_s", "makespan_s"),
            num_sessions=1000,
            load=Load(Arrivals.STEADY, concurrency=64),
            num_pairs=5,
        ),
        Experiment(
            "agents", _PAIR, plans.agent_sessions, AGENT_FIGURES, AGENT_RATIOS, scale=Scale(num_turns=10), num_pairs=5
        ),
        Experiment(
            "ablation",
            ("stock", "impala-identity", "impala-rank", "impala-rank-admission", "impala-enforce"),
            plans.agent_sessions,
            AGENT_FIGURES,
            AGENT_RATIOS,
            scale=Scale(num_turns=10),
            num_pairs=5,
        ),
        _crowd("compute-bound", 16),
        _crowd("fits-batch", 256, _ONE_ENGINE),
        _tiers("tiers", ("stock-lru-fs", "impala-tiers"), links=_GPU_LINKS),
        _tiers("tiers-slow", ("stock-lru-fs", "impala-tiers"), links=_SLOW_LINKS),
        _tiers("tiers-host", ("stock-lru", "impala-host"), links=_GPU_LINKS),
        _tiers("tiers-uncapped", ("unbounded", "impala-host", "impala-tiers")),
        _tiers("tiers-half-host", ("unbounded", "impala-tiers"), room={"host_share": 0.5}),
        _tiers(
            "tiers-ablation",
            (
                "impala-tiers",
                "impala-tiers-no-gate",
                "impala-tiers-no-choice",
                "impala-tiers-no-retention",
                "impala-tiers-no-supersession",
                "impala-tiers-no-admission",
            ),
            links=_GPU_LINKS,
        ),
        Experiment(
            "tiers-idle",
            ("stock", "impala-enforce", "impala-tiers"),
            plans.short_of_a_chunk,
            COST_FIGURES,
            ("requests_per_s", "cpu_s"),
            num_sessions=320,
            load=Load(Arrivals.STEADY, concurrency=32),
            num_pairs=5,
            machine={"block_size": 128},
        ),
        Experiment(
            "head-of-line",
            _PAIR,
            plans.beside_a_long_one,
            (*_SHORT, " / ".join(reversed(_SHORT)), "jct_mean_s of long"),
            (*_SHORT, "jct_mean_s of long"),
            num_sessions=50,
            load=Load(Arrivals.RECORDED),
            num_pairs=5,
        ),
        Experiment(
            "drift",
            _PAIR,
            plans.drifting,
            (*_QUARTERS, *AGENT_FIGURES),
            (*_QUARTERS, "stall_mean_s", "stall_p95_s"),
            num_sessions=8,
            scale=Scale(num_turns=10),
            load=Load(Arrivals.RECORDED),
            num_pairs=5,
        ),
        _control("control", _PAIR, 300, num_pairs=5),
        # Many short runs: what else the machine does changes more slowly than they do.
        _control("control-one-engine", _ONE_ENGINE, 120, num_pairs=40),
    )
}

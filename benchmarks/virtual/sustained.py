"""`python -m benchmarks.virtual.sustained`: how many sessions each arm sustains, open loop, in virtual time.

Sessions arrive at a Poisson rate, whoever is still there. Sustained is the highest offered load whose p95 slowdown
(stall over stall alone on an idle engine) in the steady state is at most 2. **Simulated**, as all of this package.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks import record
from benchmarks.record import Record
from benchmarks.serving import figures, plans
from benchmarks.serving.experiment import Source
from benchmarks.serving.experiments import EXPERIMENTS
from benchmarks.serving.sustained import LEAST_STALL_S, LIMIT, most, steady
from benchmarks.virtual.bench import BLOCK_SIZE, Bench
from benchmarks.virtual.engine import TIMINGS, describe
from impala_vllm.plugin import register
from impala_vllm.replay import arms, recording, tiny_model
from impala_vllm.replay.arms import Arm
from impala_vllm.replay.load import Arrivals, Load, Run
from impala_vllm.replay.measures import quantile, tasks
from impala_vllm.replay.plan import Plan
from impala_vllm.replay.vocabulary import Vocabulary
from impala_vllm.workload import WorkloadError

PARTS = 4
"""Loads are tried in quarters of a session."""


@dataclass
class Search:
    """One arm, one choice of sessions. A load of n is the rate at which n would be live if nobody were slowed."""

    bench: Bench
    plan: Plan
    arm: Arm
    num_blocks: int
    seed: int
    live: dict[float, float] = field(default_factory=dict[float, float])
    """Sessions there at a time in the steady state, by load."""
    tried: dict[float, float] = field(default_factory=dict[float, float])
    """p95 slowdown by load."""

    def __post_init__(self) -> None:
        alone = tasks(self._run(Load(Arrivals.STEADY, concurrency=1)))
        self._alone_s = {t.session_id: max(t.stall_s, LEAST_STALL_S) for t in alone}
        self._mean_jct_s = sum(t.jct_s for t in alone) / len(alone)

    def sustained(self) -> float:
        """The highest load with a p95 slowdown within the limit, in quarters of a session."""
        return most(lambda parts: self.slowdown(parts / PARTS), PARTS * len(self.plan.roots())) / PARTS

    def slowdown(self, load: float) -> float:
        """p95 over the sessions of the steady state."""
        rate = load / self._mean_jct_s
        done = self._run(Load(Arrivals.POISSON, rate_per_s=rate, seed=self.seed))
        inside = steady(done)
        counted = [t for t in tasks(done) if t.session_id in inside]
        self.live[load] = rate * sum(t.jct_s for t in counted) / len(counted)  # Little's law
        self.tried[load] = quantile([t.stall_s / self._alone_s[t.session_id] for t in counted], 0.95)
        return self.tried[load]

    def _run(self, load: Load) -> Run:
        return self.bench.run(self.plan, self.arm, self.num_blocks, load)[0]


@click.command()
@click.option("--traces", type=click.Path(path_type=Path), envvar="IMPALA_TRACES", help="Recorded log to replay.")
@click.option("--arms", "arm_names", default="stock,impala-enforce,unbounded", show_default=True)
@click.option("--sessions", type=click.IntRange(min=4), default=48, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), help="First turns of each session; whole sessions otherwise.")
@click.option("--hbm-tokens", type=click.IntRange(min=BLOCK_SIZE), default=12_288, show_default=True)
@click.option("--timing", type=click.Choice(list(TIMINGS)), default="cpu-26m", show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Other sessions for each.")
@click.option("--no-record", is_flag=True, help="Do not add to benchmarks/results.")
def main(traces: Path | None, arm_names: str, no_record: bool, **options: Any) -> None:
    """Search the load that each arm sustains."""
    register()
    console = Console(stderr=True)
    try:
        chosen = arms.pick(arm_names)
        model = tiny_model.build("1m")
        bench = Bench(model, Vocabulary.of_model(model), TIMINGS[options["timing"]], 128)
        by_seed = [_plan(bench, traces or recording.bundled(), options, seed) for seed in range(options["seeds"])]
    except (WorkloadError, ValueError, tiny_model.TinyModelError) as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(2)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    found: dict[str, list[tuple[float, float]]] = {arm.name: [] for arm in chosen}
    for seed, plan in enumerate(by_seed):
        for arm in chosen:
            with console.status(f"seed {seed}: {arm.name}"):
                search = Search(bench, plan, arm, max(2, options["hbm_tokens"] // BLOCK_SIZE), seed)
                load = search.sustained()
            tried = ", ".join(f"{n:g}: {s:.2f}" for n, s in sorted(search.tried.items()))
            console.print(f"seed {seed}, {arm.name}: sustains {load:g} ({tried})", highlight=False)
            found[arm.name].append((load, search.live.get(load, load)))
    records = _records(found, bench, options)
    figures.show(records, Console())
    if not no_record:
        console.print(f"recorded in {record.append(records)}; `python -m benchmarks.report` writes RESULTS.md")


def _plan(bench: Bench, traces: Path, options: dict[str, Any], seed: int) -> Plan:
    experiment = EXPERIMENTS["agents"]
    scale = dataclasses.replace(experiment.scale, num_turns=options["turns"])
    source = Source(traces, seed, bench.vocabulary, options["sessions"])
    return plans.agent_sessions(source, dataclasses.replace(experiment, scale=scale))


def _records(found: dict[str, list[tuple[float, float]]], bench: Bench, options: dict[str, Any]) -> list[Record]:
    origin = record.origin()
    params = {
        "sessions": options["sessions"],
        "turns": options["turns"] or "all",
        "HBM": f"{options['hbm_tokens']} tokens",
        "timing": describe(bench.timing),
        "limit": f"p95 slowdown {LIMIT:g}",
    }

    def of(arm: str, metric: str, unit: str, values: Sequence[float], **more: Any) -> Record:
        about = {**params, **more}
        return origin.record("sim/sustained", arm, about, metric, unit, "higher", values, source="simulated")

    made: list[Record] = []
    base = next(iter(found))
    for arm, rows in found.items():
        made.append(of(arm, "sustained load", "sessions", [n for n, _ in rows]))
        made.append(of(arm, "sessions live at it", "sessions", [live for _, live in rows]))
        if arm != base:
            ratios = [n / b for (n, _), (b, _) in zip(rows, found[base], strict=True)]
            made.append(of(arm, "sustained load ratio", "x", ratios, to=base))
    return made


if __name__ == "__main__":
    main()

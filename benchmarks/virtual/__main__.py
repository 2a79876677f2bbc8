"""`python -m benchmarks.virtual [EXPERIMENT]`: what each policy is worth, in virtual time, over many seeds and loads.

Minutes instead of hours: no model runs, so a replay takes a second or two. **Simulated**: a step's time comes from a
`Timing`; everything that decides is the code that ships. The experiments are those of `benchmarks.serving`.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks import record
from benchmarks.record import Record
from benchmarks.serving import capacity, figures
from benchmarks.serving.experiment import Experiment, Source
from benchmarks.serving.experiments import EXPERIMENTS
from benchmarks.virtual.bench import BLOCK_SIZE, Bench
from benchmarks.virtual.engine import TIMINGS, describe
from impala_vllm.plugin import register
from impala_vllm.replay import arms, recording, tiny_model
from impala_vllm.replay.arms import Arm, Machine, Room
from impala_vllm.replay.comparison import ratio
from impala_vllm.replay.plan import Plan
from impala_vllm.replay.trial import Trial
from impala_vllm.replay.vocabulary import Vocabulary
from impala_vllm.workload import WorkloadError

ARMS = "stock,impala-identity,impala-rank,impala-rank-admission,impala-enforce,unbounded"
FIGURES = {"stall_mean_s": ("s", "lower"), "tasks_per_hour": ("/h", "higher")}
RATIOS = ("tasks_per_hour", "stall_mean_s", "stall_p95_s", "computed_tokens")
AGENTS = "agents"
NAMES = [e.name for e in EXPERIMENTS.values() if e.links is None and not e.room]
"""Sizes and links of tiers are options here."""


@click.command()
@click.argument("experiment", type=click.Choice(NAMES), default=AGENTS)
@click.option("--traces", type=click.Path(path_type=Path), envvar="IMPALA_TRACES", help="Recorded log to replay.")
@click.option("--arms", "arm_names", default=ARMS, show_default=True, help="The first is what ratios are to.")
@click.option("--sessions", type=click.IntRange(min=1), help="The experiment's own number otherwise.")
@click.option("--turns", type=click.IntRange(min=1), help="First turns of each session; the experiment's otherwise.")
@click.option(
    "--oversubscription", "levels", type=click.FloatRange(min=0.1), multiple=True,
    help="Working set / HBM, once or more; 4 for agents, for others the experiment's pool.",
)  # fmt: skip
@click.option("--hbm-blocks", type=click.IntRange(min=2), help="KV pool instead, in blocks.")
@click.option("--max-num-seqs", type=click.IntRange(min=1), help="The experiment's otherwise, or 128.")
@click.option("--timing", type=click.Choice(list(TIMINGS)), default="cpu-26m", show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Other sessions for each.")
@click.option("--first-seed", type=click.IntRange(min=0), default=0, help="Others than a policy was chosen on.")
@click.option("--host-share", type=click.FloatRange(min=0.01), default=1.0, show_default=True, help="Of HBM.")
@click.option("--nvme-share", type=click.FloatRange(min=0.01), default=8.0, show_default=True, help="Of HBM.")
@click.option("--host-cap", type=click.FloatRange(min=1), help="KV to and from host, in tokens a second each way.")
@click.option("--nvme-cap", type=click.FloatRange(min=1), help="The same to and from NVMe.")
@click.option("--no-record", is_flag=True, help="Do not add to benchmarks/results.")
def main(experiment: str, traces: Path | None, arm_names: str, no_record: bool, **options: Any) -> None:
    """Replay EXPERIMENT's load on each arm, at each level of oversubscription."""
    register()
    console = Console(stderr=True)
    asked = EXPERIMENTS[experiment]
    try:
        if options["levels"] and options["hbm_blocks"]:
            raise ValueError("--oversubscription and --hbm-blocks both size the pool; give one")
        chosen = arms.pick(arm_names)
        model = tiny_model.build("1m")
        room = Room(options["host_share"], options["nvme_share"], options["host_cap"], options["nvme_cap"])
        bench = Bench(model, Vocabulary.of_model(model), TIMINGS[options["timing"]], _seats(asked, options), room)
        plans_by_seed = _plans(bench, asked, traces or recording.bundled(), options, console)
    except (WorkloadError, ValueError, tiny_model.TinyModelError) as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(2)
    logging.getLogger("vllm").setLevel(logging.ERROR)  # each of the hundreds of schedulers would say hello
    made: list[Record] = []
    levels: Sequence[float | None] = options["levels"] or ((4.0,) if _needs_level(asked, options) else (None,))
    for level in levels:
        found = _level(bench, asked, plans_by_seed, chosen, level, options, console)
        figures.show(found, Console())
        made += found
    if not no_record:
        console.print(f"recorded in {record.append(made)}; `python -m benchmarks.report` writes RESULTS.md")


def _seats(experiment: Experiment, options: dict[str, Any]) -> int:
    """Running requests at most."""
    flags = experiment.machine.get("extra_args", ())
    own = int(flags[flags.index("--max-num-seqs") + 1]) if "--max-num-seqs" in flags else 128
    return options["max_num_seqs"] or own


def _needs_level(experiment: Experiment, options: dict[str, Any]) -> bool:
    return experiment.name == AGENTS and not options["hbm_blocks"]


def _plans(bench: Bench, experiment: Experiment, traces: Path, options: dict[str, Any], console: Console) -> list[Plan]:
    made: list[Plan] = []
    if options["turns"]:
        experiment = dataclasses.replace(
            experiment, scale=dataclasses.replace(experiment.scale, num_turns=options["turns"])
        )
    for number in range(options["seeds"]):
        seed = options["first_seed"] + number
        with console.status(f"reading {traces.name}, choice {number + 1} of {options['seeds']}"):
            source = Source(traces, seed, bench.vocabulary, options["sessions"])
            made.append(experiment.plan(source, experiment))
    return made


def _num_blocks(bench: Bench, plan: Plan, experiment: Experiment, level: float | None, options: dict[str, Any]) -> int:
    if level is None:
        return options["hbm_blocks"] or Machine(bench.model, **experiment.machine).hbm_blocks
    longest = max(len(t.prompt) + len(t.output) for _, _, t in plan.turns())
    return max(longest // BLOCK_SIZE + 2, round(plan.working_set_tokens() / level / BLOCK_SIZE))


def _level(
    bench: Bench,
    experiment: Experiment,
    by_seed: list[Plan],
    chosen: list[Arm],
    level: float | None,
    options: dict[str, Any],
    console: Console,
) -> list[Record]:
    name = experiment.name + (f"-{level:g}x" if level is not None else "")
    trials: dict[str, list[Trial]] = {arm.name: [] for arm in chosen}
    for seed, plan in enumerate(by_seed):
        num_blocks = _num_blocks(bench, plan, experiment, level, options)
        load = experiment.load
        if experiment.capacity_share:
            rate = capacity.tasks_per_s(bench.run(plan, chosen[0], num_blocks, capacity.saturating())[0])
            load = capacity.load_at(experiment.capacity_share, rate, seed)
        for arm in chosen:
            with console.status(f"{name}, seed {seed}: {arm.name}"):
                trials[arm.name].append(bench.trial(plan, arm, num_blocks, load, seed))
    origin = record.origin()
    params = {
        "sessions": options["sessions"] or experiment.num_sessions,
        **({"first seed": options["first_seed"]} if options["first_seed"] else {}),
        "scale": experiment.scale.describe(),
        "turns": options["turns"] or experiment.scale.num_turns or "all",
        "load": load.describe(),
        **({"oversubscription": level} if level is not None else {"HBM": f"{num_blocks} blocks of {BLOCK_SIZE}"}),
        "timing": describe(bench.timing),
        "max_num_seqs": bench.max_num_seqs,
    }
    has_tiers = any(arm.tiers for arm in chosen)
    if has_tiers:
        params["tiers"] = bench.room.describe()
        name = name.replace(AGENTS, "tiers")

    def of(arm: str, metric: str, unit: str, better: str, values: Sequence[float], **more: Any) -> Record:
        about = {**params, **more}
        return origin.record(f"sim/{name}", arm, about, metric, unit, better, values, source="simulated")

    made: list[Record] = []
    base = chosen[0].name
    for arm, runs in trials.items():
        for metric, (unit, better) in FIGURES.items():
            made.append(of(arm, metric, unit, better, [figures.figure(t, metric) or 0.0 for t in runs]))
        made += [of(arm, metric, "%", better, shares) for metric, better, shares in figures.tier_shares(runs)]
        for metric in dict.fromkeys((*RATIOS, *experiment.ratios)) if arm != base else ():
            pairs = [
                (b, v)
                for before, after in zip(trials[base], runs, strict=True)
                if (b := figures.figure(before, metric)) and (v := figures.figure(after, metric)) is not None
            ]
            if not pairs:
                continue
            r = ratio([b for b, _ in pairs], [v for _, v in pairs])
            better = "higher" if metric in ("tasks_per_hour", "requests_per_s") else "lower"
            interval = f"{r.low:.4f}-{r.high:.4f} ({r.coverage:.0%})"
            values = [v / b for b, v in pairs]
            made.append(of(arm, f"{metric} ratio", "x", better, values, to=base, interval=interval))
    return made


if __name__ == "__main__":
    main()

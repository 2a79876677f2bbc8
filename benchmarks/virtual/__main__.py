"""`python -m benchmarks.virtual`: what each policy is worth, in virtual time, over many seeds and loads.

Minutes instead of hours: no model runs, so a replay takes a second or two. **Simulated**: a step's time comes from a
`Timing`; everything that decides is the code that ships.
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
from benchmarks.virtual import clock
from benchmarks.virtual.engine import TIMINGS, Timing, VirtualEngine
from benchmarks.virtual.tiers import Tiers
from impala_vllm.config import Settings
from impala_vllm.config import load as load_settings
from impala_vllm.plugin import register
from impala_vllm.replay import arms, recording, tiny_model
from impala_vllm.replay.arms import Arm, Room
from impala_vllm.replay.comparison import ratio
from impala_vllm.replay.load import Load, Run, drive
from impala_vllm.replay.measures import Measures, measure, quantile
from impala_vllm.replay.plan import Plan
from impala_vllm.replay.vocabulary import Vocabulary
from impala_vllm.workload import WorkloadError

ARMS = "stock,impala-identity,impala-rank,impala-rank-admission,impala-enforce,unbounded"
RATIOS = ("tasks_per_hour", "stall_mean_s", "stall_p95_s", "computed_tokens")
BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class Bench:
    """What all replays of one call have in common."""

    model: Path
    vocabulary: Vocabulary
    timing: Timing
    max_num_seqs: int
    room: Room = field(default_factory=Room)

    def replay(self, plan: Plan, arm: Arm, num_blocks: int) -> Measures:
        """One cold run of `plan` on `arm`, all of it at once."""
        done, computed_tokens = self.run(plan, arm, num_blocks, Load())
        return measure(done, computed_tokens=computed_tokens, new_tokens=plan.new_tokens(BLOCK_SIZE), cpu_s=0.0)

    def run(self, plan: Plan, arm: Arm, num_blocks: int, load: Load) -> tuple[Run, int]:
        """One cold run of `plan` on `arm` as `load` says, and the prompt tokens computed."""

        async def go() -> tuple[Run, int]:
            size = 4 * num_blocks + 4000 if arm.unbounded else num_blocks
            async with VirtualEngine(
                self.model,
                settings(arm),
                self.timing,
                num_blocks=size,
                block_size=BLOCK_SIZE,
                max_num_seqs=self.max_num_seqs,
                tiers=self._tiers(arm, num_blocks),
                eos=self.vocabulary.eos,
            ) as engine:
                return await drive(plan, engine, load), engine.computed_tokens

        return clock.run(go())

    def _tiers(self, arm: Arm, num_blocks: int) -> Tiers | None:
        if arm.tiers is None:
            return None

        def rate(tokens_per_s: float | None) -> float | None:
            return None if tokens_per_s is None else tokens_per_s / BLOCK_SIZE

        nvme_rate = rate(self.room.nvme_tokens_per_s)
        return Tiers(
            arm.tiers,
            round(self.room.host_share * num_blocks),
            round(self.room.nvme_share * num_blocks) if arm.has_nvme else 0,
            rate(self.room.host_tokens_per_s),
            nvme_rate,
            nvme_rate,
        )


def settings(arm: Arm) -> Settings | None:
    """impala's, as the arm's flags and file say; None for stock."""
    if "--impala-mode" not in arm.args:
        return None
    mode = arm.args[arm.args.index("--impala-mode") + 1]
    switches = {f"{name}.{key}": (arm.name, v) for name, pairs in arm.config.items() for key, v in pairs.items()}
    return load_settings(None, {"mode": (arm.name, mode), **switches})


@click.command()
@click.option("--traces", type=click.Path(path_type=Path), envvar="IMPALA_TRACES", help="Recorded log to replay.")
@click.option("--arms", "arm_names", default=ARMS, show_default=True, help="The first is what ratios are to.")
@click.option("--sessions", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=10, show_default=True, help="First turns of each session.")
@click.option("--oversubscription", "levels", type=click.FloatRange(min=0.1), multiple=True, default=(4.0,))
@click.option("--max-num-seqs", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--timing", type=click.Choice(list(TIMINGS)), default="cpu-26m", show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Other sessions for each.")
@click.option("--host-share", type=click.FloatRange(min=0.01), default=1.0, show_default=True, help="Of HBM.")
@click.option("--nvme-share", type=click.FloatRange(min=0.01), default=8.0, show_default=True, help="Of HBM.")
@click.option("--host-cap", type=click.FloatRange(min=1), help="KV to and from host, in tokens a second each way.")
@click.option("--nvme-cap", type=click.FloatRange(min=1), help="The same to and from NVMe.")
@click.option("--no-record", is_flag=True, help="Do not add to benchmarks/results.")
def main(traces: Path | None, arm_names: str, levels: Sequence[float], no_record: bool, **options: Any) -> None:
    """Replay recorded sessions on each arm at each level of oversubscription."""
    register()
    console = Console(stderr=True)
    try:
        chosen = arms.pick(arm_names)
        model = tiny_model.build("1m")
        room = Room(options["host_share"], options["nvme_share"], options["host_cap"], options["nvme_cap"])
        bench = Bench(model, Vocabulary.of_model(model), TIMINGS[options["timing"]], options["max_num_seqs"], room)
        plans_by_seed = _plans(bench, traces or recording.bundled(), options, console)
    except (WorkloadError, ValueError, tiny_model.TinyModelError) as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(2)
    logging.getLogger("vllm").setLevel(logging.ERROR)  # each of the hundreds of schedulers would say hello
    made: list[Record] = []
    for level in levels:
        found = _level(bench, plans_by_seed, chosen, level, options, console)
        figures.show(found, Console())
        made += found
    if not no_record:
        console.print(f"recorded in {record.append(made)}; `python -m benchmarks.report` writes RESULTS.md")


def _plans(bench: Bench, traces: Path, options: dict[str, Any], console: Console) -> list[Plan]:
    made: list[Plan] = []
    experiment = EXPERIMENTS["agents"]
    scale = dataclasses.replace(experiment.scale, num_turns=options["turns"])
    for seed in range(options["seeds"]):
        with console.status(f"reading {traces.name}, choice {seed + 1} of {options['seeds']}"):
            source = Source(traces, seed, bench.vocabulary, options["sessions"])
            made.append(plans.agent_sessions(source, dataclasses.replace(experiment, scale=scale)))
    return made


def _level(
    bench: Bench, by_seed: list[Plan], chosen: list[Arm], level: float, options: dict[str, Any], console: Console
) -> list[Record]:
    runs: dict[str, list[Measures]] = {arm.name: [] for arm in chosen}
    for seed, plan in enumerate(by_seed):
        longest = max(len(t.prompt) + len(t.output) for _, _, t in plan.turns())
        least = longest // BLOCK_SIZE + 2
        num_blocks = max(least, round(plan.working_set_tokens() / level / BLOCK_SIZE))
        for arm in chosen:
            with console.status(f"{level:g}x, seed {seed}: {arm.name}"):
                runs[arm.name].append(bench.replay(plan, arm, num_blocks))
    origin = record.origin()
    params = {
        "sessions": options["sessions"],
        "scale": EXPERIMENTS["agents"].scale.describe(),
        "turns": options["turns"],
        "oversubscription": level,
        "timing": bench.timing.describe(),
        "max_num_seqs": bench.max_num_seqs,
    }
    has_tiers = any(arm.tiers for arm in chosen)
    if has_tiers:
        params["tiers"] = bench.room.describe()
    question = f"sim/{'tiers' if has_tiers else 'agents'}-{level:g}x"

    def of(arm: str, metric: str, unit: str, better: str, values: Sequence[float], **more: Any) -> Record:
        return Record(
            question, arm, {**params, **more}, metric, unit, better, len(values),
            quantile(values, 0.2), quantile(values, 0.5), quantile(values, 0.8), "simulated", None,
            origin.commit, origin.versions, origin.machine, origin.command,
        )  # fmt: skip

    made: list[Record] = []
    base = runs[chosen[0].name]
    for arm, measured in runs.items():
        made.append(of(arm, "stall_mean_s", "s", "lower", [m.stall_mean_s for m in measured]))
        made.append(of(arm, "tasks_per_hour", "/h", "higher", [m.tasks_per_hour for m in measured]))
        for name in RATIOS if measured is not base else ():
            pairs = [float(getattr(m, name)) for m in base], [float(getattr(m, name)) for m in measured]
            r = ratio(*pairs)
            better = "higher" if name == "tasks_per_hour" else "lower"
            interval = f"{r.low:.4f}-{r.high:.4f} ({r.coverage:.0%})"
            made.append(of(arm, f"{name} ratio", "x", better, [v / b for b, v in zip(*pairs, strict=True)],
                           to=chosen[0].name, interval=interval))  # fmt: skip
    return made


if __name__ == "__main__":
    main()

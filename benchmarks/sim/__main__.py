"""`python -m benchmarks.sim`: does the simulator say what vLLM's own scheduler does in virtual time?

Exit 1 where an arm is off by more than the tolerance, or where the arms change places.
"""

import dataclasses
import logging
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.record import Record
from benchmarks.serving import plans
from benchmarks.serving.experiment import Source
from benchmarks.serving.experiments import EXPERIMENTS
from benchmarks.sim import validation
from benchmarks.sim.validation import Pair
from benchmarks.virtual.bench import Bench
from benchmarks.virtual.engine import TIMINGS, describe
from impala_vllm.plugin import register
from impala_vllm.replay import recording, tiny_model
from impala_vllm.replay.vocabulary import Vocabulary
from impala_vllm.workload import WorkloadError


@click.command()
@click.option("--traces", type=click.Path(path_type=Path), envvar="IMPALA_TRACES", help="Recorded log to replay.")
@click.option("--sessions", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=10, show_default=True, help="First turns of each session.")
@click.option("--oversubscription", "levels", type=click.FloatRange(min=0.1), multiple=True, default=(4.0,))
@click.option("--timing", type=click.Choice(list(TIMINGS)), default="cpu-26m", show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Other sessions for each.")
@click.option("--host-share", type=click.FloatRange(min=0), default=0.0, help="Host of so many times HBM.")
@click.option("--nvme-share", type=click.FloatRange(min=0), default=0.0, help="NVMe likewise; needs host.")
@click.option("--no-record", is_flag=True, help="Do not add to benchmarks/results.")
def main(
    traces: Path | None,
    sessions: int,
    turns: int,
    levels: tuple[float, ...],
    timing: str,
    seeds: int,
    host_share: float,
    nvme_share: float,
    no_record: bool,
) -> None:
    """Run the same sessions in the simulator and on vLLM's scheduler, arm by arm."""
    register()
    console = Console(stderr=True)
    try:
        model = tiny_model.build("1m")
        bench = Bench(model, Vocabulary.of_model(model), TIMINGS[timing], 128)
        experiment = EXPERIMENTS["agents"]
        experiment = dataclasses.replace(experiment, scale=dataclasses.replace(experiment.scale, num_turns=turns))
        log = traces or recording.bundled()
        by_seed = [
            plans.agent_sessions(Source(log, seed, bench.vocabulary, sessions), experiment) for seed in range(seeds)
        ]
    except (WorkloadError, ValueError, tiny_model.TinyModelError) as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(2)
    logging.getLogger("vllm").setLevel(logging.ERROR)  # each of the schedulers would say hello
    params = {"sessions": sessions, "scale": experiment.scale.describe(), "timing": describe(bench.timing)}
    made: list[Record] = []
    is_good = True
    for level in levels:
        pairs: list[Pair] = []
        for seed, plan in enumerate(by_seed):
            with console.status(f"{level:g}x, seed {seed}"):
                pairs += validation.compare(bench, plan, level, host_share, nvme_share)
        is_good &= _show(level, pairs, Console())
        below = {"host": f"{host_share:g}x HBM", "NVMe": f"{nvme_share:g}x HBM"}
        name = "sim/validation" + ("-host" if host_share else "") + ("-nvme" if nvme_share else "")
        made += _records(f"{name}-{level:g}x", pairs, {**params, **below, "oversubscription": level})
    if not no_record:
        console.print(f"recorded in {record.append(made)}; `python -m benchmarks.report` writes RESULTS.md")
    sys.exit(0 if is_good else 1)


def _show(level: float, pairs: list[Pair], console: Console) -> bool:
    verdicts = validation.verdicts(pairs)
    table = Table("policy", "stall", "hit ratio", "", title=f"simulated / virtual vLLM at {level:g}x")
    for v in verdicts:
        table.add_row(v.policy, f"{v.stall:.3f}", f"{v.hit_ratio:.3f}", "close" if v.is_close else "[red]off[/]")
    console.print(table)
    same = validation.same_ranking(pairs)
    console.print("both order the arms alike" if same else "[red]the arms change places[/]")
    return same and all(v.is_close for v in verdicts)


def _records(question: str, pairs: list[Pair], params: dict[str, object]) -> list[Record]:
    origin = record.origin()
    made: list[Record] = []
    for policy in validation.COUNTERPARTS:
        found = [p for p in pairs if p.policy == policy]
        for metric, values in (
            ("stall simulated / virtual", [p.stall_s / p.virtual_stall_s for p in found]),
            ("hit ratio simulated / virtual", [p.hits for p in found]),
            ("hit ratio simulated - virtual", [p.hit_ratio - p.virtual_hit_ratio for p in found]),
        ):
            unit = "x" if "/" in metric else ""
            made.append(origin.record(question, policy, params, metric, unit, "-", values, source="simulated"))
    return made


if __name__ == "__main__":
    main()

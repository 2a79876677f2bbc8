"""`python -m benchmarks.sim.scale`: how large and how fast is a simulation? Requests a minute of one core, and memory.

Generated: one-turn requests behind shared instructions, evenly over many replicas. With --traces: a recorded log on one
replica, as `impala simulate` takes it. One policy a call, so that the peak of memory is its own.
"""

import resource
import sys
import time
from itertools import count
from pathlib import Path
from random import Random

import click
from rich.console import Console
from rich.progress import Progress

from benchmarks import record
from benchmarks.record import Origin, Record
from impala_vllm.config import ConfigError
from impala_vllm.core.types import Outcome
from impala_vllm.sim import timing
from impala_vllm.sim.client import Served
from impala_vllm.sim.policies import KINDS, pick
from impala_vllm.sim.question import Asked, ask
from impala_vllm.sim.sessions import Session, Turn, Workload
from impala_vllm.sim.simulation import Arrivals, Setup, run
from impala_vllm.sim.timing import Timing
from impala_vllm.workload import WorkloadError, load

BLOCK = 512
STEM_BLOCKS, OUTPUT_TOKENS = 4, 64
OWN_TOKENS = (256, 2048)
STEMS_A_REPLICA = 2
LOAD = 0.7
"""Share of the time that prompts alone keep replicas busy, were nothing found."""
SAID_EVERY = 1000


@click.command()
@click.option("--replicas", type=click.IntRange(1, 100_000), default=1000, show_default=True)
@click.option("--requests", type=click.IntRange(min=1), default=1_000_000, show_default=True)
@click.option("--traces", type=click.Path(path_type=Path), help="A recorded log on one replica instead.")
@click.option("--sessions", type=click.IntRange(min=1), help="So many tasks of it, picked by the seed.")
@click.option("--policy", type=click.Choice(list(KINDS)), default="impala", show_default=True)
@click.option("--timing", "name", default=timing.DEFAULT, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--no-record", is_flag=True, help="Do not add to benchmarks/results.")
def main(
    replicas: int,
    requests: int,
    traces: Path | None,
    sessions: int | None,
    policy: str,
    name: str,
    seed: int,
    no_record: bool,
) -> None:
    """Simulate as much as was asked for, and say how long that took and how much memory."""
    console = Console(stderr=True)
    begun_s = time.process_time()
    try:
        engine = timing.load(name)
        if traces is not None:
            question = ask(load(traces), Asked(engine, num_sessions=sessions, seed=seed))
            workload, setup, kind = question.workload, question.setup, "recorded sessions"
        else:
            workload = generated(requests, STEMS_A_REPLICA * replicas, Random(seed))
            setup, kind = spread(workload, engine, replicas), "generated requests"
    except (WorkloadError, ConfigError) as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(2)
    made_s = time.process_time()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task, number = progress.add_task(policy, total=workload.num_turns()), count(1)

        def served(_: Served) -> None:
            if next(number) % SAID_EVERY == 0:
                progress.advance(task, SAID_EVERY)

        measures = run(workload, setup, pick(policy)[0], on_served=served).measures
    took_s = time.process_time() - made_s
    num, peak_gib = workload.num_turns(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    per_minute = num / took_s * 60
    console.print(
        f"{policy}: {num:,} {kind} on {setup.num_replicas:,} replicas in {took_s:,.1f} s of one core, "
        f"{per_minute:,.0f} a minute, after {made_s - begun_s:,.1f} s to make them; {peak_gib:.2f} GiB at most. Found "
        f"{measures.hit_ratio:.1%}, mean stall {measures.stall_mean_s:.1f} s (simulated).",
        highlight=False,
    )
    if not no_record:
        params = {
            "load": kind,
            "log": traces.name if traces is not None else "-",
            "replicas": setup.num_replicas,
            "requests": num,
            "prompt tokens": sum(t.prompt_tokens for t in workload.turns()),
            "block tokens": workload.block_size,
        }
        made = _records(record.origin(), policy, params, per_minute, peak_gib, seed)
        console.print(f"recorded in {record.append(made)}")


def generated(num_requests: int, num_stems: int, rng: Random) -> Workload:
    """One-turn requests, each behind one of so many instructions."""
    fresh = count(1)
    stems = [tuple(next(fresh) for _ in range(STEM_BLOCKS)) for _ in range(num_stems)]
    made: list[Session] = []
    for i in range(num_requests):
        prompt = STEM_BLOCKS * BLOCK + rng.randint(*OWN_TOKENS)
        own = tuple(next(fresh) for _ in range((prompt + OUTPUT_TOKENS) // BLOCK - STEM_BLOCKS))
        name = f"g{i}"
        turn = Turn(name, rng.choice(stems) + own, prompt, OUTPUT_TOKENS, outcome=Outcome.STOP)
        made.append(Session(name, (turn,)))
    return Workload(BLOCK, tuple(made))


def spread(workload: Workload, engine: Timing, num_replicas: int) -> Setup:
    """HBM as the timing's, and arrivals that keep `num_replicas` busy for `LOAD` of the time."""
    busy_s = sum(engine.prefill_s(t.prompt_tokens, 0) for t in workload.turns())
    arrivals = Arrivals(spread_s=busy_s / LOAD / num_replicas)
    return Setup(engine, engine.hbm_tokens, num_replicas, arrivals=arrivals)


def _records(
    origin: Origin, policy: str, params: dict[str, object], per_minute: float, peak_gib: float, seed: int
) -> list[Record]:
    return [
        origin.record("micro/simulator", policy, params, metric, unit, better, [value], seed=seed)
        for metric, unit, better, value in (
            ("requests a minute of one core", "", "higher", per_minute),
            ("peak memory", "GiB", "lower", peak_gib),
        )
    ]


if __name__ == "__main__":
    main()

"""`python -m benchmarks.sim.papers`: is each rival as good here as its paper says?

One published figure a rival, on a made-up load like the paper's, against the paper's own kind of baseline. Direction
and rough size are what counts: models, machines and traces are others.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

import click
from msgspec import structs
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.record import Record
from impala_vllm.core.types import Outcome
from impala_vllm.replay.measures import mean
from impala_vllm.sim import timing
from impala_vllm.sim.measures import Measures
from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.sessions import Session, Turn, Workload
from impala_vllm.sim.simulation import Arrivals, Setup, run

BLOCK = 128
ROUGH = 2.0
"""As good as the paper's range, or short of it by no more than this factor of the gain's logarithm."""


@dataclass(frozen=True, slots=True)
class Load:
    """Programs that call tools between turns and grow by what those answer."""

    num_programs: int
    turns: tuple[int, int]
    first_tokens: int
    grown_tokens: int
    output_tokens: int
    gap_s: float
    """Median of a tool call; lengths are log-normal."""
    spread: float
    """Of the logarithm of calls."""
    arrivals_per_s: float | None
    """None: all at once."""
    is_heavy: bool = False
    """Lengths of programs have a heavy tail."""

    def make(self, seed: int) -> Workload:
        """Programs by Poisson arrivals. One tool a fifth as long as the other two."""
        rng, keys, now = Random(seed), count(1), 0.0
        made: list[Session] = []
        for number in range(self.num_programs):
            if self.arrivals_per_s is not None:
                now += rng.expovariate(self.arrivals_per_s)
            low, high = self.turns
            num_turns = min(high, int(low * rng.paretovariate(1.1))) if self.is_heavy else rng.randint(low, high)
            made.append(self._session(f"p{number}", num_turns, rng, keys, now))
        return Workload(BLOCK, tuple(made), has_one_clock=self.arrivals_per_s is not None)

    def _session(self, name: str, num_turns: int, rng: Random, keys: "count[int]", now: float) -> Session:
        chain: list[int] = []
        turns: list[Turn] = []
        prompt, gap_s = round(self.first_tokens * rng.uniform(0.5, 1.5)), 0.0
        for index in range(num_turns):
            tokens = prompt + self.output_tokens
            chain += [next(keys) for _ in range(tokens // BLOCK - len(chain))]
            is_last = index == num_turns - 1
            tool, median_s = rng.choice((("read", self.gap_s / 5), ("test", self.gap_s), ("build", self.gap_s)))
            after_s = None if is_last else rng.lognormvariate(math.log(median_s), self.spread)
            outcome = Outcome.STOP if is_last else Outcome.TOOL_CALL
            turns.append(
                Turn(f"{name}.{index}", tuple(chain), prompt, self.output_tokens, gap_s, outcome=outcome, tool=tool,
                     next_gap_s=after_s)
            )  # fmt: skip
            prompt, gap_s = tokens + round(self.grown_tokens * rng.uniform(0.5, 1.5)), after_s or 0.0
        return Session(name, tuple(turns), arrival_s=now)


@dataclass(frozen=True, slots=True)
class Figure:
    """What a paper says, and how it is tried here."""

    policy: str
    says: str
    low: float
    high: float
    """The gain, as the paper's range."""
    load: Load
    hbm_tokens: int
    gain: Callable[[Measures, Measures], float]
    """From the baseline's and the policy's figures."""
    host_share: float = 0.0
    """Of HBM."""
    host_bytes_per_s: float | None = None
    """The paper's link; None: the timing's."""
    forgets: bool = False
    """The paper's baseline has no prefix cache: the policy's gain is over that."""

    def is_reproduced(self, gain: float) -> bool:
        """The right direction, and not far below what the paper says at least."""
        return gain > 1.0 and math.log(gain) >= math.log(self.low) / ROUGH


def faster(base: Measures, policy: Measures) -> float:
    return base.jct_mean_s / policy.jct_mean_s


def more(base: Measures, policy: Measures) -> float:
    return policy.tasks_per_hour / base.tasks_per_hour


CODING = Load(60, (6, 14), 6000, 1500, 200, 3.0, 0.8, 1.0)
BATCH = Load(64, (10, 20), 4000, 2000, 300, 4.0, 0.8, None)
TAILED = Load(160, (1, 40), 3000, 600, 200, 1.0, 0.6, 16.0, is_heavy=True)
ANSWERING = Load(80, (4, 8), 3000, 300, 60, 0.3, 1.0, 6.0)
WORKFLOW = Load(8, (8, 8), 16000, 200, 16, 0.3, 0.2, None)
SLOW_CALLS = Load(48, (5, 9), 8000, 600, 150, 6.0, 0.3, 1.0)

FIGURES = (
    Figure("continuum", "1.12-3.66x shorter jobs than vLLM", 1.12, 3.66, CODING, 220_000, faster),
    Figure("continuum-dynamic", "the same", 1.12, 3.66, CODING, 220_000, faster),
    Figure("plas", "4-15x more programs at equal latency than vLLM", 1.5, 15.0, TAILED, 300_000, faster),
    Figure("atlas", "the same", 1.5, 15.0, TAILED, 300_000, faster),
    Figure("infercept", "1.6-2x over a server that discards", 1.6, 2.0, ANSWERING, 100_000, faster, forgets=True),
    Figure("thunderagent", "1.5-3.6x the throughput of vLLM", 1.5, 3.6, BATCH, 250_000, more),
    Figure("thunderagent-proxy", "1.12-1.16x in a vendor's port of it", 1.12, 3.6, BATCH, 250_000, more),
    Figure("concur", "up to 4.09x the throughput of batches of agents", 1.2, 4.09, BATCH, 250_000, more),
    Figure("mars", "up to 5.94x shorter, 1.87x for OpenHands", 1.3, 5.94, CODING, 220_000, faster),
    Figure("tokencake", "47 % less latency than vLLM", 1.4, 1.9, SLOW_CALLS, 150_000, faster, 8.0),
    Figure("kvflow", "1.83-2.19x over a hierarchical radix cache", 1.2, 2.19, WORKFLOW, 100_000, faster, 8.0, 6e9),
)  # fmt: skip


@click.command()
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--only", help="One policy.")
@click.option("--no-record", is_flag=True, help="Do not add to benchmarks/results.")
def main(seeds: int, only: str | None, no_record: bool) -> None:
    """Try every published figure. Exit 1 where one is not reproduced."""
    console, made, is_good = Console(stderr=True), list[Record](), True
    table = Table("policy", "the paper", "here", "")
    for figure in FIGURES:
        if only and figure.policy != only:
            continue
        with console.status(figure.policy):
            gains = [_gain(figure, seed) for seed in range(seeds)]
        gain = mean(gains)
        is_good &= (reproduced := figure.is_reproduced(gain))
        table.add_row(figure.policy, figure.says, f"{gain:.2f}x", "" if reproduced else "[red]not reproduced[/]")
        console.print(f"{figure.policy}: {', '.join(f'{g:.2f}' for g in gains)}", highlight=False)
        made.append(_record(figure, gains))
    Console().print(table)
    if not no_record:
        console.print(f"recorded in {record.append(made)}; `python -m benchmarks.report` writes RESULTS.md")
    sys.exit(0 if is_good else 1)


def _gain(figure: Figure, seed: int) -> float:
    load = figure.load.make(seed)
    engine = timing.load(timing.DEFAULT)
    if figure.host_bytes_per_s is not None:
        engine = structs.replace(engine, host_bytes_per_s=figure.host_bytes_per_s)
    setup = Setup(engine, figure.hbm_tokens, arrivals=Arrivals(spread_s=1.0))
    with_host = dataclasses.replace(setup, host_tokens=round(figure.host_share * figure.hbm_tokens))
    # TokenCake's baseline is vLLM with HBM alone; KVFlow's has a host tier as well.
    base_setup = with_host if figure.policy == "kvflow" else setup
    base = run(_forgetting(load) if figure.forgets else load, base_setup, KINDS["stock"]).measures
    return figure.gain(base, run(load, with_host, KINDS[figure.policy]).measures)


def _forgetting(load: Workload) -> Workload:
    """The same without anything to find in a cache."""
    keys = count(-1, -1)

    def turn(before: Turn) -> Turn:
        return dataclasses.replace(before, keys=tuple(next(keys) for _ in before.keys))

    sessions = (dataclasses.replace(s, turns=tuple(map(turn, s.turns))) for s in load.sessions)
    return dataclasses.replace(load, sessions=tuple(sessions))


def _record(figure: Figure, gains: Sequence[float]) -> Record:
    params = {
        "paper": figure.says,
        "load": f"{figure.load.num_programs} programs, {figure.load.turns[0]}-{figure.load.turns[1]} turns, calls of "
        f"{figure.load.gap_s:g} s",
        "HBM": f"{figure.hbm_tokens} tokens",
    }
    metric = "throughput ratio" if figure.gain is more else "JCT ratio"
    return record.origin().record("sim/papers", figure.policy, params, metric, "x", "higher", gains, source="simulated")


if __name__ == "__main__":
    main()

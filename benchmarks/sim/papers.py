"""`python -m benchmarks.sim.papers`: is each rival as good here as its paper says?

One published figure a rival, on a made-up load like the paper's, against the paper's own kind of baseline. Direction
and rough size are what counts: models, machines and traces are others.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click
from msgspec import structs
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.record import Record
from benchmarks.sim.gains import PATIENCE, RATES, faster, more, sooner, sustained, token_s
from benchmarks.sim.programs import Agents, Workflow, forgetting
from impala_vllm.replay.measures import mean
from impala_vllm.sim import timing
from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.simulation import Arrivals, Outcome, Setup, run

ROUGH = 2.0
"""By how much the logarithm of a gain may be smaller than that of the least that the paper publishes."""


@dataclass(frozen=True, slots=True)
class Figure:
    """What a paper says, and how it is tried here."""

    policy: str
    says: str
    low: float
    high: float
    """The gain: the least and the most that the paper publishes, not what would be found here."""
    load: Agents | Workflow
    hbm_tokens: int
    gain: Callable[[Outcome, Outcome], float] | None
    """From the baseline's and the policy's run; None: programs a second at equal latency, over many runs."""
    host_share: float = 0.0
    """Of HBM."""
    host_bytes_per_s: float | None = None
    """The link; None: the timing's."""
    base_has_host: bool = False
    """So does the paper's baseline."""
    forgets: bool = False
    """The paper's baseline has no prefix cache: the policy's gain is over that."""

    def is_reproduced(self, gain: float) -> bool:
        """The right direction, and not far below what the paper says at least."""
        return gain > 1.0 and math.log(gain) >= math.log(self.low) / ROUGH


CODING = Agents(60, (6, 14), 6000, 1500, 200, 3.0, 0.8, 1.0)
BATCH = Agents(64, (10, 20), 4000, 2000, 300, 4.0, 0.8, None)
LIGHT_CALLS = Agents(64, (10, 20), 4000, 2000, 300, 1.0, 0.5, None)
TAILED = Agents(400, (1, 60), 2000, 600, 200, 1.0, 0.6, 1.0, is_heavy=True)
ANSWERING = Agents(80, (4, 8), 3000, 300, 60, 0.3, 1.0, 6.0)
SLOW_CALLS = Agents(48, (5, 9), 8000, 600, 150, 6.0, 0.3, 1.0)
IN_TURN = Workflow(10, 8, 8192, 512, 32)

FIGURES = (
    Figure("continuum", "1.12-3.66x shorter jobs than vLLM", 1.12, 3.66, CODING, 220_000, faster),
    Figure("continuum-dynamic", "1.12-3.66x shorter jobs than vLLM", 1.12, 3.66, CODING, 220_000, faster),
    Figure("plas", "4-15x more programs at equal latency than vLLM", 4.0, 15.0, TAILED, 100_000, None, 8.0,
           base_has_host=True),
    Figure("atlas", "4-15x more programs at equal latency than vLLM", 4.0, 15.0, TAILED, 100_000, None, 8.0,
           base_has_host=True),
    Figure("infercept", "1.6-2x over a server that discards", 1.6, 2.0, ANSWERING, 100_000, faster, forgets=True),
    Figure("thunderagent", "1.5-3.6x the throughput of vLLM", 1.5, 3.6, LIGHT_CALLS, 250_000, more),
    Figure("thunderagent-proxy", "1.12-1.16x in a vendor's port of it", 1.12, 1.16, LIGHT_CALLS, 250_000, more),
    Figure("concur", "1.9x and 4.09x the throughput of batches of agents", 1.9, 4.09, BATCH, 250_000, more),
    Figure("mars", "1.87x shorter for OpenHands, up to 5.94x", 1.87, 5.94, CODING, 220_000, faster),
    Figure("tokencake", "47 % less latency than vLLM, 1.89x", 1.89, 1.89, SLOW_CALLS, 150_000, faster, 8.0),
    Figure("kvflow", "1.83x over a hierarchical radix cache, 2.19x where many run", 1.83, 2.19, IN_TURN, 60_000, sooner,
           8.0, 6e9, base_has_host=True),
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
    if figure.gain is None:
        return _sustained(figure, figure.policy, seed) / _sustained(figure, "stock", seed)
    load = figure.load.make(seed)
    base = run(forgetting(load) if figure.forgets else load, _setup(figure, figure.base_has_host), KINDS["stock"])
    return figure.gain(base, run(load, _setup(figure, True), KINDS[figure.policy]))


def _sustained(figure: Figure, policy: str, seed: int) -> float:
    load = figure.load
    assert isinstance(load, Agents)

    def latency_s(rate: float) -> float:
        made = dataclasses.replace(load, arrivals_per_s=rate).make(seed)
        return token_s(run(made, _setup(figure, True), KINDS[policy]))

    return sustained(latency_s, PATIENCE * latency_s(RATES[0]))


def _setup(figure: Figure, has_host: bool) -> Setup:
    engine = timing.load(timing.DEFAULT)
    if figure.host_bytes_per_s is not None:
        engine = structs.replace(engine, host_bytes_per_s=figure.host_bytes_per_s)
    host_tokens = round(figure.host_share * figure.hbm_tokens) if has_host else 0
    return Setup(engine, figure.hbm_tokens, host_tokens=host_tokens, arrivals=Arrivals(spread_s=1.0))


def _record(figure: Figure, gains: Sequence[float]) -> Record:
    metrics = {faster: "JCT ratio", sooner: "ratio of JCT less tools", more: "throughput ratio", None: "ratio of load"}
    params = {
        "paper": figure.says,
        "load": figure.load.describe(),
        "HBM": f"{figure.hbm_tokens} tokens",
    }
    metric = metrics[figure.gain]
    return record.origin().record("sim/papers", figure.policy, params, metric, "x", "higher", gains, source="simulated")


if __name__ == "__main__":
    main()

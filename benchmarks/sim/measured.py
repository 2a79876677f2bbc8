"""`python -m benchmarks.sim.measured`: does the simulator say what a real engine was measured to do, on the same plan?

Each measured record of serving/agents and serving/tiers that the log can make again is simulated with its pool, tiers
and links. Machines are as fast as they are on the day (one load took 200 and 311 s), so stall is compared as a ratio to
the record's first arm; hit ratios as they are. Exit 1 where an arm is off by more than the tolerance.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
from msgspec import structs
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.record import Origin, Record, RecordError
from benchmarks.serving import plans
from benchmarks.serving.experiment import Source
from benchmarks.serving.experiments import EXPERIMENTS
from benchmarks.sim.lowered import workload
from benchmarks.sim.validation import COUNTERPARTS, NOTHING, TOLERANCE, WITH_HOST, WITH_NVME
from impala_vllm.replay import recording, tiny_model
from impala_vllm.replay.lowering import Scale
from impala_vllm.replay.plan import Plan
from impala_vllm.replay.vocabulary import Vocabulary
from impala_vllm.sim import timing
from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.sessions import Workload
from impala_vllm.sim.simulation import Arrivals, Setup, run
from impala_vllm.workload import WorkloadError

QUESTIONS = re.compile(r"serving/(baseline|agents|tiers[a-z-]*)(-[0-9.]+x)?")
POLICIES = {arm: policy for arms in (COUNTERPARTS, WITH_HOST, WITH_NVME) for policy, arm in arms.items()}
TIMINGS = {"5m": "cpu-5m-avx2", "8m": "cpu-8m-avx2", "26m": "cpu-26m"}
"""By the size in the name of a record's model."""
_MODEL = re.compile(r"model tiny-(\w+)-")
_POOL = re.compile(r"HBM pool (\d+) blocks of (\d+)")
_TURNS = re.compile(r"first (\d+) turns")
_TIER = re.compile(r"(host|NVMe) ([\d.]+)x[^(]*\((?:uncapped|([\d,]+) tokens/s)\)")


@dataclass(frozen=True, slots=True)
class Case:
    """The newest run of a question with one load, as its records tell it."""

    question: str
    num_tasks: int
    num_requests: int
    prompt_tokens: int
    num_turns: int
    """First turns of each session."""
    model: str
    """Its size, a key of `TIMINGS`."""
    num_blocks: int
    block_size: int
    shares: dict[str, tuple[float, float | None]]
    """Of HBM, and tokens a second, of `host` and `NVMe`; empty: none."""
    stall_s: dict[str, float]
    """By arm, the first one first."""
    hit_ratio: dict[str, float]
    seed: int

    def __str__(self) -> str:
        return f"{self.question.partition('/')[2]}, {self.num_tasks} sessions, {self.model}"


@dataclass(frozen=True, slots=True)
class Compared:
    """One arm, measured and simulated; stall over the first arm's."""

    case: Case
    engine: timing.Timing
    arm: str
    stall: float
    simulated_stall: float
    hits: float
    simulated_hits: float

    @property
    def is_close(self) -> bool:
        off = abs(self.simulated_hits - self.hits)
        return abs(self.simulated_stall / self.stall - 1) <= TOLERANCE and (
            off <= NOTHING or off <= TOLERANCE * self.hits
        )


@click.command()
@click.option("--traces", type=click.Path(path_type=Path), envvar="IMPALA_TRACES", help="The log that was replayed.")
@click.option("--timing", "name", help="For all records; the one of each record's model otherwise.")
@click.option("--no-record", is_flag=True, help="Do not add to benchmarks/results.")
def main(traces: Path | None, name: str | None, no_record: bool) -> None:
    """Simulate what was measured on real engines, and compare."""
    console, log = Console(stderr=True), traces or recording.bundled()
    try:
        engines = {model: timing.load(name or theirs) for model, theirs in TIMINGS.items()}
        found = list(cases(record.read(sorted(record.RESULTS.glob("*.jsonl"))), log.name))
        if not found:
            raise WorkloadError(f"no measured record of {log.name}; give --traces the log that the records name")
        vocabulary = Vocabulary.of_model(tiny_model.build("1m"))
        compared: list[Compared] = []
        made: dict[tuple[int, int, int], Plan] = {}
        for case in found:
            with console.status(str(case)):
                key = case.num_tasks, case.num_turns, case.seed
                plan = made.get(key) or _plan(case, Source(log, case.seed, vocabulary, case.num_tasks))
                made[key] = plan
                if (plan.num_turns(), plan.prompt_tokens()) != (case.num_requests, case.prompt_tokens):
                    console.print(f"{case}: {log.name} does not give that load any more; left out", highlight=False)
                    continue
                compared += compare(case, workload(plan, case.block_size, vocabulary), engines[case.model])
    except (WorkloadError, RecordError, ValueError, tiny_model.TinyModelError) as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(2)
    _show(compared, Console())
    if compared and not no_record:
        console.print(f"recorded in {record.append(_records(record.origin(), compared))}")
    sys.exit(0 if compared and all(c.is_close for c in compared) and same_ranking(compared) else 1)


def cases(records: Iterable[Record], log: str) -> Iterator[Case]:
    """What was measured on `log` and can be simulated; `records` are oldest first."""
    runs: dict[tuple[str, ...], list[Record]] = {}
    for r in records:
        if QUESTIONS.fullmatch(r.question) and r.source == "measured" and r.params.get("log") == log:
            key = r.question, *(str(r.params.get(name)) for name in ("tasks", "requests", "engine", "tiers"))
            before = runs.get(key)
            if before is None or (before[0].commit, before[0].command) != (r.commit, r.command):
                runs[key] = [r]
            else:
                before.append(r)
    for key in sorted(runs):
        case = _case(runs[key])
        if case is not None:
            yield case


def compare(case: Case, load: Workload, engine: timing.Timing) -> list[Compared]:
    """Every arm of the record in the simulator, with its pool, tiers and links."""
    hbm = (case.num_blocks - 1) * case.block_size  # vLLM keeps one block to itself
    shares = case.shares
    rates = {n: None if r is None else r * engine.kv_bytes_per_token for n, (_, r) in shares.items()}
    host, nvme = rates.get("host"), rates.get("NVMe")
    capped = structs.replace(engine, host_bytes_per_s=host, nvme_read_bytes_per_s=nvme, nvme_write_bytes_per_s=nvme)
    setup = Setup(capped, hbm, arrivals=Arrivals(spread_s=5.0))
    with_host = replace(setup, host_tokens=round(shares["host"][0] * hbm)) if shares else setup
    with_nvme = replace(with_host, nvme_tokens=round(shares["NVMe"][0] * hbm)) if shares else setup
    by_arms = {
        arm: made
        for arms, made in ((WITH_NVME, with_nvme), (WITH_HOST, with_host), (COUNTERPARTS, setup))
        for arm in arms.values()
    }
    found = {arm: run(load, by_arms[arm], KINDS[POLICIES[arm]]).measures for arm in case.stall_s}
    first = next(iter(case.stall_s))
    return [
        Compared(
            case,
            engine,
            arm,
            case.stall_s[arm] / case.stall_s[first],
            measures.stall_mean_s / found[first].stall_mean_s,
            case.hit_ratio[arm],
            measures.hit_ratio,
        )
        for arm, measures in found.items()
    ]


def same_ranking(compared: Sequence[Compared]) -> bool:
    """Are the arms of every case in the same order of stall?"""
    for case in {str(c.case): c.case for c in compared}.values():
        mine = [c for c in compared if c.case == case]
        measured, simulated = (sorted(mine, key=key) for key in (lambda c: c.stall, lambda c: c.simulated_stall))
        if measured != simulated:
            return False
    return True


def _case(run: Sequence[Record]) -> Case | None:
    params, figures = run[0].params, {(r.variant, r.metric): r.p50 for r in run}
    arms = [arm for arm, metric in figures if metric == "stall_mean_s" and arm in POLICIES]
    pool, turns = _POOL.search(str(params["engine"])), _TURNS.match(str(params["scale"]))
    model = _MODEL.search(str(params["engine"]))
    is_batch = params.get("load") == "closed loop, whole batch, starts over 5 s"
    if model is None or model[1] not in TIMINGS or pool is None or turns is None or not is_batch or len(arms) < 2:
        return None
    tiers = _TIER.findall(str(params.get("tiers", "")))
    return Case(
        run[0].question,
        params["tasks"],
        params["requests"],
        params["prompt tokens"],
        int(turns[1]),
        model[1],
        int(pool[1]),
        int(pool[2]),
        {name: (float(share), float(rate.replace(",", "")) if rate else None) for name, share, rate in tiers},
        {arm: figures[arm, "stall_mean_s"] for arm in arms},
        {arm: figures[arm, "cached_share"] for arm in arms},
        run[0].seed or 0,
    )


def _plan(case: Case, source: Source) -> Plan:
    experiment = replace(EXPERIMENTS["agents"], scale=Scale(num_turns=case.num_turns))
    return plans.agent_sessions(source, experiment)


def _show(compared: Iterable[Compared], console: Console) -> None:
    table = Table("measured", "arm", "stall to first", "simulated", "hit ratio", "simulated", "", title="simulated?")
    for c in compared:
        stalls, hits = (f"{c.stall:.3f}", f"{c.simulated_stall:.3f}"), (f"{c.hits:.3f}", f"{c.simulated_hits:.3f}")
        table.add_row(str(c.case), c.arm, *stalls, *hits, "close" if c.is_close else "[red]off[/]")
    console.print(table)


def _records(origin: Origin, compared: Iterable[Compared]) -> list[Record]:
    made: list[Record] = []
    for c in compared:
        params = {
            "timing": c.engine.describe(),
            "measured stall, to the first arm's": f"{c.stall:.3f}",
            "measured hit ratio": f"{c.hits:.3f}",
            "": "close" if c.is_close else "**off**",
        }
        for metric, value in (
            ("stall to the first arm's, simulated / measured", c.simulated_stall / c.stall),
            ("hit ratio, simulated", c.simulated_hits),
        ):
            unit = "x" if "/" in metric else ""
            name = f"{c.case}: {c.arm}"
            made.append(origin.record("sim/measured", name, params, metric, unit, "-", [value], source="simulated"))
    return made


if __name__ == "__main__":
    main()

"""`python -m benchmarks.serving.restart [--traces FILE]`: does a server that starts again compute what its disk holds?

Sessions are played up to a turn; the server ends, or is killed, and starts again on the same disk; then each session's
next turn comes. Below is what an infinite cache would compute of these turns, above what a server with nothing would.
"""

import asyncio
import dataclasses
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks import record
from benchmarks.record import Record
from benchmarks.serving import figures, pool
from benchmarks.serving.experiment import Source
from benchmarks.serving.experiments import EXPERIMENTS
from impala_vllm.replay import arms, counters, recording, tiny_model
from impala_vllm.replay.arms import Arm, Machine, Room
from impala_vllm.replay.client import Client
from impala_vllm.replay.load import Load, Run, drive
from impala_vllm.replay.measures import quantile
from impala_vllm.replay.plan import Plan
from impala_vllm.replay.server import Server, ServerError
from impala_vllm.replay.vocabulary import ModelError, Vocabulary
from impala_vllm.workload import WorkloadError

SALT = "restart"
SETTLED_S, SETTLES_WITHIN_S = 2.0, 60.0
"""What is to be written has been, once the disk was given nothing for so long; it is not waited for longer."""
FIGURES = {
    "computed tokens after the restart": ("tokens", "lower"),
    "computed beyond an infinite cache": ("tokens", "lower"),
    "share computed beyond it": ("%", "lower"),
    "resume_ttft_p50_s": ("s", "lower"),
    "start_s": ("s", "lower"),
}


@click.command()
@click.option("--traces", type=click.Path(path_type=Path), envvar="IMPALA_TRACES", help="Recorded log to replay.")
@click.option("--arms", "arm_names", default="impala-tiers", show_default=True, help="Comma-separated; with a disk.")
@click.option("--sessions", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=5, show_default=True, help="Of each before the restart.")
@click.option("--kill", is_flag=True, help="Kill the server instead of asking it to end.")
@click.option("--oversubscription", type=click.FloatRange(min=0.01), default=4.0, show_default=True)
@click.option("--host-share", type=click.FloatRange(min=0.01), default=1.0, show_default=True, help="Of HBM.")
@click.option("--nvme-share", type=click.FloatRange(min=0.01), default=8.0, show_default=True, help="Of HBM.")
@click.option("--model", type=click.Path(path_type=Path), help="Model directory; the 26 M one is built otherwise.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--no-record", is_flag=True, help="Do not add to benchmarks/results.")
def main(traces: Path | None, arm_names: str, no_record: bool, **options: Any) -> None:
    """Restart a real vLLM engine with a filled disk."""
    console, logs = Console(stderr=True), Path(tempfile.mkdtemp(prefix="impala-restart-"))
    try:
        made = _run(traces or recording.bundled(), arm_names, options, console, logs)
    except (WorkloadError, ServerError, ModelError, tiny_model.TinyModelError, ValueError) as e:
        click.echo(f"error: {e}", err=True)
        if not any(logs.iterdir()):
            logs.rmdir()
        sys.exit(2)
    figures.show(made, Console())
    if not no_record:
        console.print(f"recorded in {record.append(made)}; `python -m benchmarks.report` writes RESULTS.md")
    shutil.rmtree(logs)


def turns_of(plan: Plan, begin: int, end: int) -> Plan:
    """Turns `begin` to `end` of each task that has so many, without its children."""
    tasks = (task for task in plan.roots() if len(task.turns) >= end)
    alone = (
        dataclasses.replace(task, turns=tuple(dataclasses.replace(t, joins=()) for t in task.turns[begin:end]))
        for task in tasks
    )
    return Plan(tuple(alone))


def _run(traces: Path, arm_names: str, options: dict[str, Any], console: Console, logs: Path) -> list[Record]:
    chosen = arms.pick(arm_names)
    if without := [arm.name for arm in chosen if not arm.has_nvme]:
        raise ValueError(f"{without[0]} has no disk to start again with; choose arms that have one")
    experiment, turns = EXPERIMENTS["tiers"], options["turns"]
    experiment = dataclasses.replace(experiment, scale=dataclasses.replace(experiment.scale, num_turns=turns + 1))
    room = Room(options["host_share"], options["nvme_share"])
    machine = Machine(options["model"] or tiny_model.build("26m"), room=room)
    source = Source(traces, options["seed"], Vocabulary.of_model(machine.model), options["sessions"])
    with console.status(f"reading {traces.name}"):
        plan = turns_of(experiment.plan(source, experiment), 0, turns + 1)
    if not plan.sessions:
        raise ValueError(f"{traces.name}: no session of {turns + 1} turns in it; lower --turns")
    machine = pool.oversubscribed(machine, plan, options["oversubscription"])
    params = {
        "log": traces.name,
        "tasks": len(plan.sessions),
        "turns before": turns,
        "working set": f"{plan.working_set_tokens()} tokens",
        "engine": machine.describe(),
        "tiers": room.describe(),
        "end": "killed" if options["kill"] else "asked to end",
    }
    origin, made = record.origin(), list[Record]()
    for arm in chosen:
        found = _restarted(plan, turns, arm, machine, options["kill"], logs, console)
        for name, value in zip(FIGURES, found, strict=True):
            unit, better = FIGURES[name]
            made.append(
                origin.record("serving/restart", arm.name, params, name, unit, better, [value], seed=options["seed"])
            )
    return made


def _restarted(
    plan: Plan, turns: int, arm: Arm, machine: Machine, kill: bool, logs: Path, console: Console
) -> tuple[float, ...]:
    """The figures, in their order."""
    before, then = turns_of(plan, 0, turns), turns_of(plan, turns, turns + 1)
    with arms.server(arm, machine, logs) as engine:
        with console.status(f"{arm.name}: {before.num_turns()} requests, then a restart"):
            engine.wait_ready()
            _replay(engine, before)
            _settle(engine, arms.disk(arm, logs))
        engine.stop(grace_s=0.0 if kill else 15.0)
    with arms.server(arm, machine, logs) as engine, console.status(f"{arm.name}: {then.num_turns()} requests more"):
        start_s = engine.wait_ready()
        at_start = counters.scrape(engine.url)
        run = _replay(engine, then)
        computed = counters.computed_tokens(at_start, counters.scrape(engine.url))
    waits_s = [r.first_token_s - r.start_s for r in run.results if r.error is None and r.first_token_s is not None]
    if computed is None or len(waits_s) < then.num_turns():
        raise ServerError(f"{arm.name}: {then.num_turns() - len(waits_s)} of {then.num_turns()} requests failed")
    beyond = computed - plan.new_tokens(machine.block_size) + before.new_tokens(machine.block_size)
    return computed, beyond, 100 * beyond / then.prompt_tokens(), quantile(waits_s, 0.5), start_s


def _replay(engine: Server, plan: Plan) -> Run:
    async def go() -> Run:
        async with Client(engine.url, "tiny", salt=SALT) as client:
            return await drive(plan, client, Load())

    return asyncio.run(go())


def _settle(engine: Server, disk: Path) -> None:
    """Wait until nothing is written any more."""
    begun_s = time.monotonic()
    seen: float | None = None
    while time.monotonic() < begun_s + SETTLES_WITHIN_S:
        before, seen = seen, _written_bytes(engine, disk)
        if before == seen and time.monotonic() > begun_s + SETTLED_S:
            return
        time.sleep(SETTLED_S)


def _written_bytes(engine: Server, disk: Path) -> float:
    """What the engine counts; what lies on the disk where it counts none, as stock does."""
    counted = counters.scrape(engine.url).get("impala_kv_nvme_write_bytes_total")
    return counted if counted is not None else sum(_size(path) for path in disk.rglob("*"))


def _size(path: Path) -> int:
    """Of a file; 0 where it has gone or been renamed meanwhile."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


if __name__ == "__main__":
    main()

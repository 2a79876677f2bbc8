"""Runs one plan on several arms, repetition by repetition, and keeps what each run showed.

Engines of all arms stay up side by side (an idle one costs about 1 % of a core, the same for every
arm); a repetition is cold because its cache salt is new. `fresh_engines` starts one per run instead. Arms that name
the same `engine` take turns on one.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from impala_vllm.replay import counters, linkage
from impala_vllm.replay.arms import Arm, Machine, server
from impala_vllm.replay.client import Client
from impala_vllm.replay.linkage import LinkScore
from impala_vllm.replay.load import Load, Run, TurnResult, drive
from impala_vllm.replay.measures import Measures, measure
from impala_vllm.replay.plan import Plan
from impala_vllm.replay.server import Server


class Watcher(Protocol):
    """Told what happens, for a progress display."""

    def starting(self, arm: str, waited_s: float) -> None: ...
    def running(self, arm: str, repetition: int, num_turns: int) -> None: ...
    def turn(self, result: TurnResult) -> None: ...
    def ended(self, trial: "Trial") -> None: ...


@dataclass(frozen=True, slots=True)
class Trial:
    """One replay on one arm."""

    arm: str
    repetition: int
    run: Run
    measures: Measures
    links: LinkScore | None = None
    """How well the server recognised the sessions, where the arm does."""
    traces: tuple[dict[str, Any], ...] = ()
    """The server's trace table after the run."""
    observer_s: float | None = None
    """Seconds of the engine loop spent in impala's hooks."""
    tiers: Mapping[str, float] = field(default_factory=dict[str, float])
    """What our tiers counted meanwhile."""


def run_trials(
    plan: Plan,
    arms: Sequence[Arm],
    order: Sequence[str],
    machine: Machine,
    load: Load,
    log_dir: Path,
    watcher: Watcher,
    *,
    fresh_engines: bool = False,
    send_session_ids: bool = False,
    start_timeout_s: float = 300.0,
    done: list[Trial] | None = None,
) -> list[Trial]:
    """Replay `plan` once for each name in `order`. Raises ServerError if an engine fails to start or dies.

    Engines are stopped on every way out. Each trial is added to `done` as it ends: what has been measured outlives an
    interruption.
    """
    by_name = {arm.name: arm for arm in arms}
    new_tokens = plan.new_tokens(machine.block_size)
    trials = done if done is not None else []
    with ExitStack() as up:
        servers: dict[str, Server] = {}
        for i, name in enumerate(order):
            arm = by_name[name]
            key = arm.engine or name
            if fresh_engines or key not in servers:
                if fresh_engines:
                    up.close()
                servers[key] = up.enter_context(server(arm, machine, log_dir))
                servers[key].wait_ready(start_timeout_s, lambda waited, name=key: watcher.starting(name, waited))
                asyncio.run(_warm_up(servers[key], plan))
            repetition = sum(t.arm == name for t in trials)
            watcher.running(name, repetition, plan.num_turns())
            salt = f"run{i}{arm.salt_mark}"
            try:
                trial = _trial(plan, arm, servers[key], repetition, load, salt, new_tokens, watcher, send_session_ids)
            except OSError as e:
                servers[key].fail(f"does not answer any more ({e})")
            trials.append(trial)
            watcher.ended(trial)
    return trials


def _trial(
    plan: Plan,
    arm: Arm,
    engine: Server,
    repetition: int,
    load: Load,
    salt: str,
    new_tokens: int,
    watcher: Watcher,
    send_session_ids: bool,
) -> Trial:
    before, cpu_s = counters.scrape(engine.url), engine.cpu_seconds()

    async def replay() -> Run:
        async with Client(engine.url, "tiny", salt=salt, send_session_ids=send_session_ids) as client:
            # One name in all runs of an engine would be joined with an earlier run's answer.
            return await drive(plan, client, load, run_id=salt, on_turn=watcher.turn)

    run = asyncio.run(replay())
    engine.check_alive()
    after = counters.scrape(engine.url)
    measures = measure(
        run,
        computed_tokens=counters.computed_tokens(before, after),
        new_tokens=new_tokens,
        cpu_s=engine.cpu_seconds() - cpu_s,
    )
    if not arm.recognises:
        return Trial(arm.name, repetition, run, measures)
    links = linkage.score(run, linkage.join(run, linkage.fetch(engine.url, "links")))
    traces = tuple(linkage.fetch(engine.url, "traces"))
    observer_s, tiers = counters.observer_s(before, after), counters.tiers(before, after)
    return Trial(arm.name, repetition, run, measures, links, traces, observer_s, tiers)


async def _warm_up(engine: Server, plan: Plan) -> None:
    """The first steps of an engine are slow (lazy set-up); they belong to nobody's figures."""
    shortest = min((turn for _, _, turn in plan.turns()), key=lambda t: len(t.prompt))
    async with Client(engine.url, "tiny", salt="warm-up") as client:
        for i in range(2):
            answer = await client.send(shortest, f"warm-{i:06d}", "warm-up")
            if answer.error is not None:
                engine.fail(f"refused a request: {answer.error}")

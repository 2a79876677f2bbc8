"""How many tasks a second a server gets through when it never runs out of them: an open loop is a share of that."""

import asyncio
from dataclasses import replace
from pathlib import Path

from impala_vllm.replay import arms
from impala_vllm.replay.arms import Arm, Machine
from impala_vllm.replay.client import Client
from impala_vllm.replay.load import Arrivals, Load, Run, drive
from impala_vllm.replay.measures import tasks
from impala_vllm.replay.plan import Plan

LIVE = 48
"""Tasks live at a time: three for each of 16 running slots, so that none of them stands empty."""


def load_at(share: float, tasks_per_s: float, seed: int) -> Load:
    """Poisson arrivals at that share of capacity."""
    return Load(Arrivals.POISSON, rate_per_s=share * tasks_per_s, seed=seed)


def saturating() -> Load:
    """The closed loop from which capacity is read."""
    return Load(Arrivals.STEADY, concurrency=LIVE)


def tasks_per_s(run: Run) -> float:
    """Tasks that end a second in the second half of the time in which others still wait to start.

    The plan needs a few times `LIVE` tasks: the first half is the ramp.
    """
    done = tasks(run)
    last_s = max(t.start_s for t in done)
    ended = sum(last_s / 2 < t.start_s + t.jct_s <= last_s for t in done)
    if not ended:
        raise ValueError(f"{len(done)} tasks are too few to measure capacity with {LIVE} live; give more --sessions")
    return 2 * ended / last_s


def measured(plan: Plan, arm: Arm, machine: Machine, logs: Path) -> float:
    """Tasks a second of a real server, started for this and stopped again."""

    async def go(url: str) -> Run:
        async with Client(url, "tiny", salt="capacity") as client:
            return await drive(plan, client, saturating(), "capacity")

    with arms.server(replace(arm, name=f"{arm.name}-capacity"), machine, logs) as engine:
        engine.wait_ready()
        return tasks_per_s(asyncio.run(go(engine.url)))

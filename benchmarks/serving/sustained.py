"""How many sessions a server sustains: the most that stay live at once with a p95 slowdown of at most 2.

Each step keeps that many lanes busy over the whole plan and leaves the ramps out: only sessions that
started after the first of all ended and before the last of all started count.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import record
from benchmarks.record import Record
from impala_vllm.replay import arms
from impala_vllm.replay.arms import Arm, Machine
from impala_vllm.replay.client import Client
from impala_vllm.replay.load import Arrivals, Load, Run, drive
from impala_vllm.replay.measures import quantile, tasks
from impala_vllm.replay.plan import Plan
from impala_vllm.replay.server import ServerError

LIMIT = 2.0
LEAST_STALL_S = 0.05
"""Stall alone is at least this: a ratio to a few milliseconds is noise."""


def most(slowdown: Callable[[int], float], highest: int, limit: float = LIMIT) -> int:
    """The largest n in 1..highest with slowdown(n) <= limit, taking it to grow with n.

    One alone is not slowed by definition, so it is not measured. Doubles, then halves the bracket:
    O(log n) measurements.
    """
    good, probe = 1, 2
    while probe <= highest and slowdown(probe) <= limit:
        good, probe = probe, probe * 2
    bad = min(probe, highest + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        if slowdown(middle) <= limit:
            good = middle
        else:
            bad = middle
    return good


def steady(run: Run) -> set[str]:
    """Tasks outside the ramps at both ends; all of them where nothing else is left."""
    every = tasks(run)
    filled = min((t.start_s + t.jct_s for t in every), default=0.0)
    last = max((t.start_s for t in every), default=0.0)
    inside = {t.session_id for t in every if filled <= t.start_s < last}
    return inside or {t.session_id for t in every}


def run(plan: Plan, chosen: Sequence[Arm], machine: Machine, logs: Path, console: Console, seed: int | None) -> None:
    """Search on each arm, print, and record unless `seed` is None."""
    found: list[Record] = []
    origin = record.origin()
    for arm in chosen:
        with arms.server(arm, machine, logs) as engine:
            engine.wait_ready()
            search = _Search(plan, arm.name, engine.url, console)
            search.measure_alone()
            sustained = most(search.slowdown, len(plan.roots()))
        params = {"tried": ", ".join(f"{n}: {s:.2f}" for n, s in sorted(search.tried.items())), "limit": LIMIT}
        found.append(
            origin.record(
                "serving/sustained", arm.name, params, "sustained sessions", "", "higher", [sustained], seed=seed
            )
        )
        console.print(f"{arm.name}: sustains {sustained} sessions at once", highlight=False)
    if seed is not None:
        record.append(found)


class _Search:
    """Probes one running engine; every probe is cold by a cache salt of its own."""

    def __init__(self, plan: Plan, arm: str, url: str, console: Console) -> None:
        self.tried: dict[int, float] = {}
        self._plan = plan
        self._arm = arm
        self._url = url
        self._console = console
        self._num_probes = 0
        self._alone: dict[str, float] = {}

    def measure_alone(self) -> None:
        self._alone = {t.session_id: max(t.stall_s, LEAST_STALL_S) for t in tasks(self._replay(1))}

    def slowdown(self, concurrency: int) -> float:
        """p95 over the tasks in the steady state."""
        result = self._replay(concurrency)
        counted = steady(result)
        ratios = [t.stall_s / self._alone[t.session_id] for t in tasks(result) if t.session_id in counted]
        self.tried[concurrency] = worst = quantile(ratios, 0.95)
        self._console.print(f"  {self._arm}: {concurrency} live, p95 slowdown {worst:.2f}", highlight=False)
        return worst

    def _replay(self, concurrency: int) -> Run:
        self._num_probes += 1
        name = f"probe{self._num_probes}"

        async def go() -> Run:
            async with Client(self._url, "tiny", salt=name) as client:
                return await drive(self._plan, client, Load(Arrivals.STEADY, concurrency=concurrency), name)

        done = asyncio.run(go())
        if num_failed := sum(r.error is not None for r in done.results):
            raise ServerError(
                f"{self._arm}: {num_failed} requests failed with {concurrency} live; its figures do not count"
            )
        return done

"""One policy on one workload of the study at one point: the piece that is run, kept and never run twice.

Processes share nothing: each reads the logs for itself and is asked for cells, so results do not depend on how many.
"""

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from benchmarks.sim import grid, loads
from benchmarks.sim.grid import Point
from impala_vllm.sim import timing
from impala_vllm.sim.charge import FREE, MEASURED
from impala_vllm.sim.measures import Measures
from impala_vllm.sim.policies import KINDS, Kind
from impala_vllm.sim.sessions import Workload
from impala_vllm.sim.simulation import run

PAYING = "impala-paying"
"""impala whose steps are longer by what deciding took it in benchmarks; rivals decide for nothing."""


@dataclass(frozen=True, slots=True)
class Cell:
    """`level`, `tiers` and `links` None: HBM holds everything, so they change nothing."""

    workload: str
    level: float | None
    tiers: str | None
    links: str | None
    policy: str
    seed: int

    def __str__(self) -> str:
        where = "unbounded" if self.level is None else f"{self.level:g}x, {self.tiers}, {self.links}"
        return f"{self.workload} {where}, seed {self.seed}: {self.policy}"


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of a cell."""

    cell: Cell
    level: float
    """Working set over HBM as it was: less than asked for where one turn needs more."""
    measures: Measures
    missed: int | None = None
    """Blocks that impala looked up in HBM alone and did not find; None: not counted."""
    fewest: int | None = None
    """The same of Belady's MIN, in the same order."""


@dataclass(frozen=True, slots=True)
class Scale:
    """All that a cell does not say."""

    traces: Path
    requests: Path | None
    tasks: int
    turns: int
    timing: str


def cells(points: Sequence[Point], policies: Sequence[str], seeds: int) -> list[Cell]:
    """Each once. Bounds have the first seed only: nothing is judged by them seed by seed."""
    made: dict[Cell, None] = {}
    for point in points:
        for policy in policies:
            kind = _kind(policy)
            for seed in range(1 if kind.is_bound and not kind.is_unbounded else seeds):
                made[cell(point, policy, seed)] = None
    return list(made)


def cell(point: Point, policy: str, seed: int) -> Cell:
    """Of a policy at a point."""
    if _kind(policy).is_unbounded:
        return Cell(point.workload, None, None, None, policy, seed)
    return Cell(point.workload, point.level, point.tiers, point.links, policy, seed)


@contextmanager
def running(todo: Sequence[Cell], scale: Scale, processes: int) -> Iterator[Iterator[Ran]]:
    """Results as they come; those under way are given up at the end. Raises WorkloadError at the first without logs."""
    if processes == 1:
        yield _here(todo, scale)
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin, (scale,))
    try:
        yield (future.result() for future in as_completed([pool.submit(_run, cell) for cell in todo]))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()


class Bench:
    """Logs, read once, and the last workloads made of them."""

    def __init__(self, scale: Scale) -> None:
        self._scale = scale
        self._engine = timing.load(scale.timing)
        self._logs = loads.read(scale.traces, scale.requests)
        self._made = lru_cache(maxsize=4)(self._make)

    def run(self, cell: Cell) -> Ran:
        """Takes seconds to a minute."""
        load = self._made(cell.workload, cell.seed)
        # What holds everything asks for no level; where it stands does not matter.
        point = Point(cell.workload, cell.level or 1.0, cell.tiers or "HBM", cell.links or grid.GPU_LINKS)
        setup = grid.setup(load, self._engine, point)
        setup = replace(setup, charge=MEASURED if cell.policy == PAYING else FREE)
        counts_misses = cell.policy == "impala" and cell.tiers == "HBM"
        found = run(load, setup, _kind(cell.policy), counts_misses=counts_misses)
        level, misses = load.working_set_tokens() / setup.hbm_tokens, found.misses
        if misses is None:
            return Ran(cell, level, found.measures)
        return Ran(cell, level, found.measures, misses.num_missed, misses.num_fewest)

    def _make(self, workload: str, seed: int) -> Workload:
        return self._logs.make(workload, self._scale.tasks, self._scale.turns, seed)


def _here(todo: Sequence[Cell], scale: Scale) -> Iterator[Ran]:
    if todo:
        bench = Bench(scale)
        yield from map(bench.run, todo)


def _kind(policy: str) -> Kind:
    return KINDS["impala" if policy == PAYING else policy]


_scale: list[Scale] = []
"""Of a process of the pool: one."""


@lru_cache(maxsize=1)
def _bench() -> Bench:
    return Bench(_scale[0])


def _begin(scale: Scale) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asked for the runs ends them
    _scale.append(scale)


def _run(cell: Cell) -> Ran:
    return _bench().run(cell)

"""Sends a plan to a server: who starts when, who waits for whom, how many at once.

Sessions keep their own order, gaps and joins; `Load` decides only when each task starts.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from impala_vllm.replay.client import Answer
from impala_vllm.replay.plan import Plan, PlannedSession, PlannedTurn
from impala_vllm.workload.tool_time import ToolTime


class Sender(Protocol):
    """Serves one turn; its clock is the event loop's. `client.Client` is one."""

    async def send(self, turn: PlannedTurn, request_id: str, session_id: str) -> Answer: ...


class Arrivals(Enum):
    """When tasks start."""

    BATCH = "batch"
    """Closed loop: all of them, spread over `spread_s`."""
    STEADY = "steady"
    """Closed loop: `concurrency` live at a time, the next starts when one ends."""
    POISSON = "poisson"
    """Open loop at `rate_per_s`."""
    RECORDED = "recorded"
    """Open loop at the recorded times on the scaled clock."""


@dataclass(frozen=True, slots=True)
class Load:
    """When the tasks of a plan start."""

    arrivals: Arrivals = Arrivals.BATCH
    spread_s: float = 5.0
    concurrency: int = 0
    rate_per_s: float = 1.0
    seed: int = 0

    def describe(self) -> str:
        match self.arrivals:
            case Arrivals.BATCH:
                return f"closed loop, whole batch, starts over {self.spread_s:g} s"
            case Arrivals.STEADY:
                return f"closed loop, {self.concurrency} tasks live at a time"
            case Arrivals.POISSON:
                return f"open loop, Poisson arrivals at {self.rate_per_s:g}/s"
            case Arrivals.RECORDED:
                return "open loop, recorded arrivals"

    def starts(self, tasks: list[PlannedSession]) -> list[float]:
        """Seconds from the beginning at which each task starts; not used for STEADY."""
        match self.arrivals:
            case Arrivals.BATCH | Arrivals.STEADY:
                return [i * self.spread_s / max(1, len(tasks)) for i in range(len(tasks))]
            case Arrivals.POISSON:
                rng, now, times = random.Random(self.seed), 0.0, list[float]()
                for _ in tasks:
                    times.append(now)
                    now += rng.expovariate(self.rate_per_s)
                return times
            case Arrivals.RECORDED:
                first = min((t.arrival_s for t in tasks), default=0.0)
                return [t.arrival_s - first for t in tasks]


@dataclass(frozen=True, slots=True)
class TurnResult:
    """What became of one planned turn. Times are seconds from the beginning of the run."""

    session_id: str
    parent_id: str | None
    index: int
    recorded_id: str
    sent_id: str
    """The X-Request-Id it was sent with."""
    start_s: float
    first_token_s: float | None
    end_s: float
    tools_s: float
    """Tool time on the task's critical path from its beginning to this turn."""
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    error: str | None


@dataclass(frozen=True, slots=True)
class Run:
    """All turns of one replay, in the order they ended."""

    results: tuple[TurnResult, ...]
    makespan_s: float


async def drive(
    plan: Plan, client: Sender, load: Load, run_id: str = "r", on_turn: Callable[[TurnResult], None] | None = None
) -> Run:
    """Replay `plan`; returns when every task ended. A failed turn is recorded and its task goes on."""
    return await _Drive(plan, client, run_id, on_turn).run(load)


@dataclass(frozen=True, slots=True)
class _End:
    """A session's."""

    at_s: float
    tools: ToolTime


@dataclass
class _Drive:
    plan: Plan
    client: Sender
    run_id: str
    on_turn: Callable[[TurnResult], None] | None
    results: list[TurnResult] = field(default_factory=list)
    begin_s: float = 0.0
    num_sent: int = 0

    async def run(self, load: Load) -> Run:
        tasks = self.plan.roots()
        self.begin_s = asyncio.get_running_loop().time()
        if load.arrivals is Arrivals.STEADY:
            await self._steady(tasks, load.concurrency)
        else:
            starts = load.starts(tasks)
            async with asyncio.TaskGroup() as group:
                for task, at in zip(tasks, starts, strict=True):
                    group.create_task(self._start(task, at))
        end = max((r.end_s for r in self.results), default=0.0)
        begin = min((r.start_s for r in self.results), default=0.0)
        return Run(tuple(self.results), end - begin)

    async def _steady(self, tasks: list[PlannedSession], concurrency: int) -> None:
        left = iter(tasks)

        async def lane() -> None:
            for task in left:
                await self._session(task, ToolTime())

        async with asyncio.TaskGroup() as group:
            for _ in range(max(1, concurrency)):
                group.create_task(lane())

    async def _start(self, session: PlannedSession, after_s: float) -> _End:
        await asyncio.sleep(after_s)
        return await self._session(session, ToolTime())

    async def _child(self, child: PlannedSession, before_s: float) -> _End:
        tools = ToolTime(before_s)
        await self._sleep(child.start_gap_s, tools)
        return await self._session(child, tools)

    async def _session(self, session: PlannedSession, tools: ToolTime) -> _End:
        children = [s for s in self.plan.sessions if s.parent_id == session.session_id]
        running: dict[str, asyncio.Task[_End]] = {}
        free_s = self._now_s()
        async with asyncio.TaskGroup() as group:
            for index in range(-1, len(session.turns)):
                if index >= 0:
                    turn = session.turns[index]
                    _wait_for([await running[name] for name in turn.joins if name in running], tools, free_s)
                    await self._sleep(turn.gap_s, tools)
                    await self._turn(session, index, tools.total_s)
                    free_s = self._now_s()
                for child in children:
                    if max(-1, child.after_turn) == index:
                        running[child.session_id] = group.create_task(self._child(child, tools.total_s))
        _wait_for([task.result() for task in running.values()], tools, free_s)
        return _End(self._now_s(), tools)

    async def _sleep(self, gap_s: float, tools: ToolTime) -> None:
        await asyncio.sleep(gap_s)
        tools.add(gap_s, self._now_s())

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time() - self.begin_s

    async def _turn(self, session: PlannedSession, index: int, tools_s: float) -> None:
        turn = session.turns[index]
        # A name of our own: it carries nothing that could tell the server whose turn this is.
        sent_id = f"{self.run_id}-{self.num_sent:06d}"
        self.num_sent += 1
        answer: Answer = await self.client.send(turn, sent_id, session.session_id)
        first = answer.first_token_s
        result = TurnResult(
            session_id=session.session_id,
            parent_id=session.parent_id,
            index=index,
            recorded_id=turn.request_id,
            sent_id=sent_id,
            start_s=answer.start_s - self.begin_s,
            first_token_s=None if first is None else first - self.begin_s,
            end_s=answer.end_s - self.begin_s,
            tools_s=tools_s,
            prompt_tokens=answer.prompt_tokens or len(turn.prompt),
            output_tokens=answer.output_tokens,
            cached_tokens=answer.cached_tokens,
            error=answer.error,
        )
        self.results.append(result)
        if self.on_turn is not None:
            self.on_turn(result)


def _wait_for(ended: list[_End], tools: ToolTime, since_s: float) -> None:
    """Time spent waiting for children is the last one's: of it, only its tool time is not the server's doing."""
    if ended:
        tools.wait_for(max(ended, key=lambda e: e.at_s).tools, since_s)

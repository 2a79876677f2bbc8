"""Who starts when and who waits for whom, with a client that answers at once."""

import asyncio
import time

import pytest

from impala_vllm.replay.client import Answer
from impala_vllm.replay.load import Arrivals, Load, drive
from impala_vllm.replay.measures import tasks
from impala_vllm.replay.plan import Plan, PlannedSession, PlannedTurn


class FakeClient:
    """Answers after a tick; remembers what came and how much was under way at once."""

    def __init__(self, failing: str | None = None) -> None:
        self.sent: list[str] = []
        self.most_at_once = 0
        self._now = 0
        self._failing = failing

    async def send(self, turn: PlannedTurn, request_id: str, session_id: str) -> Answer:
        self.sent.append(turn.request_id)
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        start = time.monotonic()
        await asyncio.sleep(0.001)
        self._now -= 1
        error = "HTTP 500: no" if turn.request_id == self._failing else None
        return Answer(start, time.monotonic(), start, len(turn.prompt), len(turn.output), 0, error)


def session(name: str, num_turns: int = 2, parent: str | None = None, **more: object) -> PlannedSession:
    turns = tuple(PlannedTurn(f"{name}#{i}", (1, 2), (3,), 0.0) for i in range(num_turns))
    return PlannedSession(name, turns, parent, **more)  # type: ignore[arg-type]


async def test_turns_of_a_session_come_in_order_and_sessions_together() -> None:
    client = FakeClient()
    plan = Plan((session("a", 3), session("b", 3)))
    run = await drive(plan, client, Load(spread_s=0.0))  # type: ignore[arg-type]
    assert [t for t in client.sent if t.startswith("a")] == ["a#0", "a#1", "a#2"]
    assert client.most_at_once == 2
    assert len(run.results) == 6
    assert len({r.sent_id for r in run.results}) == 6


async def test_a_child_starts_after_its_turn_and_is_joined() -> None:
    client = FakeClient()
    turns = (
        PlannedTurn("p#0", (1,), (3,), 0.0),
        PlannedTurn("p#1", (1,), (3,), 0.0, joins=("c",)),
    )
    plan = Plan((PlannedSession("p", turns), session("c", 3, "p", after_turn=0)))
    run = await drive(plan, client, Load())  # type: ignore[arg-type]
    assert client.sent == ["p#0", "c#0", "c#1", "c#2", "p#1"]
    assert len(tasks(run)) == 1


async def test_a_joined_childs_tool_time_is_not_the_servers_doing() -> None:
    child = PlannedSession(
        "c", (PlannedTurn("c#0", (1,), (3,), 0.0), PlannedTurn("c#1", (1,), (3,), 0.05)), "p", 0, 0.02
    )
    parent = PlannedSession("p", (PlannedTurn("p#0", (1,), (3,), 0.0), PlannedTurn("p#1", (1,), (3,), 0.03, ("c",))))
    run = await drive(Plan((parent, child)), FakeClient(), Load())  # type: ignore[arg-type]
    assert tasks(run)[0].gaps_s == pytest.approx(0.1)


async def test_what_a_child_does_while_its_parent_is_busy_is_not_taken_off_twice() -> None:
    child = PlannedSession(
        "c", (PlannedTurn("c#0", (1,), (3,), 0.0), PlannedTurn("c#1", (1,), (3,), 0.02)), "p", 0, 0.02
    )
    gaps_s = (0.0, 0.5, 0.03)
    turns = tuple(PlannedTurn(f"p#{i}", (1,), (3,), g, ("c",) if i == 2 else ()) for i, g in enumerate(gaps_s))
    run = await drive(Plan((PlannedSession("p", turns), child)), FakeClient(), Load())  # type: ignore[arg-type]
    assert tasks(run)[0].gaps_s == pytest.approx(0.53)


async def test_the_tools_of_a_child_that_outlives_its_parent_are_not_the_servers_doing() -> None:
    child = PlannedSession("c", (PlannedTurn("c#0", (1,), (3,), 0.0), PlannedTurn("c#1", (1,), (3,), 0.2)), "p", 0, 0.1)
    run = await drive(Plan((session("p", 1), child)), FakeClient(), Load())  # type: ignore[arg-type]
    assert tasks(run)[0].gaps_s == pytest.approx(0.3)


async def test_a_failed_turn_is_recorded_and_its_session_goes_on() -> None:
    client = FakeClient(failing="a#0")
    run = await drive(Plan((session("a", 2),)), client, Load())  # type: ignore[arg-type]
    assert [r.error for r in run.results] == ["HTTP 500: no", None]


async def test_a_steady_load_keeps_so_many_alive() -> None:
    client = FakeClient()
    plan = Plan(tuple(session(f"s{i}") for i in range(9)))
    run = await drive(plan, client, Load(Arrivals.STEADY, concurrency=3))  # type: ignore[arg-type]
    assert client.most_at_once == 3
    assert len(run.results) == 18


def test_poisson_arrivals_are_seeded_and_recorded_ones_start_at_zero() -> None:
    many = [session(f"s{i}", arrival_s=10.0 + i) for i in range(4)]
    poisson = Load(Arrivals.POISSON, rate_per_s=2.0, seed=1)
    assert poisson.starts(many) == poisson.starts(many)
    assert poisson.starts(many) == sorted(poisson.starts(many))
    assert Load(Arrivals.RECORDED).starts(many) == [0.0, 1.0, 2.0, 3.0]
    assert Load(spread_s=4.0).starts(many) == [0.0, 1.0, 2.0, 3.0]

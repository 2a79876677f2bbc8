"""A plan made of named parts, and the results of one of them.

Sessions and requests of a part are named `PART/...`; that name is all that says where they belong. Figures of
a part are those of `measures` over its own results.
"""

from collections.abc import Mapping
from dataclasses import replace

from impala_vllm.replay.load import Run
from impala_vllm.replay.plan import Plan, PlannedSession, PlannedTurn


def combine(parts: Mapping[str, Plan]) -> Plan:
    """All parts as one plan, each session under its part's name. Names hold no `/`."""
    return Plan(
        tuple(_named(name, session) for name, plan in parts.items() for session in plan.sessions),
        sum(plan.num_capped_sessions for plan in parts.values()),
        sum(plan.num_dropped_turns for plan in parts.values()),
    )


def spread(plan: Plan, begin_s: float, over_s: float) -> Plan:
    """The plan with its tasks arriving evenly in [begin_s, begin_s + over_s), in order."""
    step_s = over_s / max(1, len(plan.roots()))
    arrivals = {task.session_id: begin_s + i * step_s for i, task in enumerate(plan.roots())}
    sessions = tuple(replace(s, arrival_s=arrivals.get(s.session_id, s.arrival_s)) for s in plan.sessions)
    return replace(plan, sessions=sessions)


def only(run: Run, part: str) -> Run:
    """What became of one part. Its makespan is its own: first arrival to last end."""
    results = tuple(r for r in run.results if r.session_id.startswith(f"{part}/"))
    begin = min((r.start_s for r in results), default=0.0)
    return Run(results, max((r.end_s for r in results), default=0.0) - begin)


def _named(part: str, session: PlannedSession) -> PlannedSession:
    def turn(t: PlannedTurn) -> PlannedTurn:
        return replace(t, request_id=f"{part}/{t.request_id}", joins=tuple(f"{part}/{j}" for j in t.joins))

    return replace(
        session,
        session_id=f"{part}/{session.session_id}",
        turns=tuple(turn(t) for t in session.turns),
        parent_id=None if session.parent_id is None else f"{part}/{session.parent_id}",
    )

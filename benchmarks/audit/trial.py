"""Audits of changed sessions, compared with what was changed; and how fast an audit is."""

import time
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from benchmarks.audit.mutations import Expected, mutate
from benchmarks.audit.sessions import Session, write
from impala_vllm.insight.audit import Finding, audit


@dataclass(slots=True)
class Tally:
    """Turns of one kind of change, over all sessions."""

    sessions: int = 0
    expected: int = 0
    named: int = 0
    """With the right cause in the right segment."""
    clean: int = 0
    """Turns where nothing was to be found."""
    alarms: int = 0
    """Of those, where something was."""
    mistaken: list[str] = field(default_factory=list)
    """What was said instead, for a person to read."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.sessions + other.sessions,
            self.expected + other.expected,
            self.named + other.named,
            self.clean + other.clean,
            self.alarms + other.alarms,
            self.mistaken + other.mistaken,
        )


def clean(sessions: list[Session], folder: Path, with_ids: bool = True) -> Tally:
    """Of sessions as they are: all that is found is a false alarm."""
    log = folder / "clean.jsonl"
    write(log, sessions if with_ids else mingled(sessions))
    found: list[Finding] = []
    report = audit(log, on_finding=found.append)
    return Tally(len(sessions), clean=report.requests, alarms=len(found), mistaken=[_say(f) for f in found])


def changed(kind: str, sessions: list[Session], seed: int, folder: Path, with_ids: bool = True) -> Tally:
    """Of sessions with one kind of change in each."""
    tally = Tally()
    made, wanted = change(kind, sessions, seed)
    if not made:
        return tally
    log = folder / "changed.jsonl"
    write(log, made if with_ids else mingled(made))
    found: dict[str, Finding] = {}
    audit(log, on_finding=lambda f: found.__setitem__(f.request_id, f))
    for session in made:
        expected = wanted[session.name]
        tally.sessions += 1
        for turn, request in enumerate(session.requests):
            finding = found.get(request["request_id"])
            if turn not in expected.turns:
                tally.clean += 1
                tally.alarms += finding is not None
            else:
                tally.expected += 1
                tally.named += (right := finding is not None and _is(finding, expected))
                if right:
                    continue
            if finding is not None or turn in expected.turns:
                tally.mistaken.append(f"{kind}: {_say(finding)}, not {expected.cause.value} in {expected.segment}")
    return tally


def change(kind: str, sessions: list[Session], seed: int) -> tuple[list[Session], dict[str, Expected]]:
    """Changed copies of those that the change fits, and what is to be found in each."""
    wanted: dict[str, Expected] = {}
    made: list[Session] = []
    for session in sessions:
        result = mutate(kind, session.requests, seed)
        if result is not None:
            made.append(Session(session.name, result[0]))
            wanted[session.name] = result[1]
    return made, wanted


def mingled(sessions: list[Session], at_once: int = 8) -> list[Session]:
    """Without ids, and so many sessions in turns: what a log without ids looks like."""
    found: list[Session] = []
    for start in range(0, len(sessions), at_once):
        group = sessions[start : start + at_once]
        rounds = zip_longest(*(session.requests for session in group))
        requests = [request for requests in rounds for request in requests if request is not None]
        found.append(Session("", [{k: v for k, v in r.items() if k != "session_id"} for r in requests]))
    return found


def speed(sessions: list[Session], folder: Path) -> float:
    """MB of log a second of one core's time, reading and all."""
    log = folder / "speed.jsonl"
    size = write(log, sessions)
    start = time.process_time()
    audit(log)
    return size / 1e6 / (time.process_time() - start)


def _is(finding: Finding, expected: Expected) -> bool:
    return finding.cause is expected.cause and expected.segment in (None, finding.segment)


def _say(finding: Finding | None) -> str:
    if finding is None:
        return "nothing"
    return f"{finding.cause.value} in {finding.segment} ({finding.request_id})"

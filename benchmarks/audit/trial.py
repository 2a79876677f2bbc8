"""Audits of changed sessions, compared with what was changed; and how fast an audit is."""

import time
from dataclasses import dataclass, field
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


def clean(sessions: list[Session], folder: Path) -> Tally:
    """Of sessions as they are: all that is found is a false alarm."""
    log = folder / "clean.jsonl"
    write(log, sessions)
    found: list[Finding] = []
    report = audit(log, on_finding=found.append)
    return Tally(len(sessions), clean=report.requests, alarms=len(found), mistaken=[_say(f) for f in found])


def changed(kind: str, sessions: list[Session], seed: int, folder: Path) -> Tally:
    """Of sessions with one kind of change in each."""
    tally = Tally()
    wanted: dict[str, Expected] = {}
    made: list[Session] = []
    for session in sessions:
        change = mutate(kind, session.requests, seed)
        if change is not None:
            made.append(Session(session.name, change[0]))
            wanted[session.name] = change[1]
    if not made:
        return tally
    log = folder / "changed.jsonl"
    write(log, made)
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


def speed(sessions: list[Session], folder: Path, with_ids: bool) -> float:
    """MB of log a second of one core's time, reading and all."""
    log = folder / "speed.jsonl"
    kept = sessions if with_ids else [_anonymous(session) for session in sessions]
    size = write(log, kept)
    start = time.process_time()
    audit(log)
    return size / 1e6 / (time.process_time() - start)


def _anonymous(session: Session) -> Session:
    return Session(session.name, [{k: v for k, v in r.items() if k != "session_id"} for r in session.requests])


def _is(finding: Finding, expected: Expected) -> bool:
    return finding.cause is expected.cause and expected.segment in (None, finding.segment)


def _say(finding: Finding | None) -> str:
    if finding is None:
        return "nothing"
    return f"{finding.cause.value} in {finding.segment} ({finding.request_id})"

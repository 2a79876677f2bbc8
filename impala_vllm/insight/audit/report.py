"""What an audit found, summed up by cause."""

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from impala_vllm.insight.audit.bloat import Bloat, Carried, Waste
from impala_vllm.insight.audit.causes import Cause
from impala_vllm.insight.audit.schemas import Tool
from impala_vllm.workload.text_blocks import BYTES_A_TOKEN

MAX_WORST = 10


@dataclass(frozen=True, slots=True)
class Finding:
    """One turn that does not begin with the prompt before it, or was not served as if it did."""

    session: str
    request_id: str
    turn: int
    """Counted from 1 within the session."""
    segment: str
    cause: Cause
    lost_tokens: int
    block: int
    """The first block that is another one, from 1."""
    was: str | None = None
    now: str | None = None
    """Fragments around the first difference, only where asked for."""

    def document(self) -> dict[str, Any]:
        """As plain data."""
        found: dict[str, Any] = {
            "session": self.session,
            "request_id": self.request_id,
            "turn": self.turn,
            "block": self.block,
            "segment": self.segment,
            "cause": self.cause.value,
            "lost_tokens": self.lost_tokens,
        }
        if self.now is not None:
            found |= {"was": self.was, "now": self.now}
        return found


@dataclass(frozen=True, slots=True)
class Worst:
    """A session that lost much."""

    session: str
    turns: int
    findings: int
    lost_tokens: int


@dataclass(slots=True)
class Total:
    """All findings of one cause."""

    cause: Cause
    turns: int = 0
    lost_tokens: int = 0
    sessions: set[int] = field(default_factory=set)
    """Hashes of their names."""
    segments: Counter[str] = field(default_factory=Counter)

    def note(self, finding: Finding) -> None:
        """One more."""
        self.turns += 1
        self.lost_tokens += finding.lost_tokens
        self.sessions.add(hash(finding.session))
        self.segments[_group(finding.segment)] += 1


@dataclass(slots=True)
class Report:
    """The whole audit. Token counts are estimates where `estimated`."""

    estimated: bool
    requests: int = 0
    sessions: int = 0
    sessions_forgotten: int = 0
    resumed: int = 0
    """Turns that had a prompt before them in their session."""
    counted: int = 0
    """Requests whose prompt tokens the log knows."""
    served: int = 0
    """Turns of which the log says what was cached."""
    normalised: int = 0
    """Prompts in which known nonces were held fast."""
    skipped: int = 0
    first_error: str | None = None
    prompt_tokens: int = 0
    totals: dict[Cause, Total] = field(default_factory=dict)
    starts: dict[Cause, Total] = field(default_factory=dict)
    """First prompts of sessions that could have begun like an earlier session's: not in `totals`."""
    answers: dict[Cause, Total] = field(default_factory=dict)
    """Answers that stand in the next prompt otherwise than they were given: not in `totals` either."""
    answered: int = 0
    """Turns after a turn of which the log has the answer."""
    missing_answers: int = 0
    """Answers that the next prompt leaves out."""
    worst: list[Finding] = field(default_factory=list)
    worst_sessions: list[Worst] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)
    carried: Carried = field(default_factory=Carried)

    def skip(self, error: Exception) -> None:
        """Count what could not be read."""
        self.skipped += 1
        self.first_error = self.first_error or str(error)

    def note(self, finding: Finding) -> None:
        """Add one finding. O(1)."""
        self.totals.setdefault(finding.cause, Total(finding.cause)).note(finding)
        if len(self.worst) < MAX_WORST or finding.lost_tokens > self.worst[-1].lost_tokens:
            self.worst = sorted([*self.worst, finding], key=lambda f: -f.lost_tokens)[:MAX_WORST]

    def note_start(self, finding: Finding) -> None:
        """A first prompt that parts from an earlier session's."""
        self.starts.setdefault(finding.cause, Total(finding.cause)).note(finding)

    def note_answer(self, finding: Finding) -> None:
        """An answer that came back as another one."""
        self.answers.setdefault(finding.cause, Total(finding.cause)).note(finding)

    def end(self, session: Worst) -> None:
        """A session is over, or forgotten."""
        if session.lost_tokens:
            best = [*self.worst_sessions, session]
            self.worst_sessions = heapq.nsmallest(MAX_WORST, best, key=lambda s: (-s.lost_tokens, s.session))

    def causes(self) -> list[Total]:
        """Dearest first."""
        return dearest(self.totals.values())

    @property
    def lost_tokens(self) -> int:
        """Computed again, over all causes."""
        return sum(total.lost_tokens for total in self.totals.values())

    def never_called(self) -> list[Tool]:
        """Tools that were carried and not called once."""
        return [tool for tool in self.tools if not tool.num_calls]

    def wastes(self) -> list[Waste]:
        """What prompts carry without need, heaviest first."""
        idle = self.never_called()
        found = [Waste(Bloat.IDLE_TOOLS, len(idle), sum(tool.schema_bytes for tool in idle))] if idle else []
        return sorted([*found, *self.carried.wastes()], key=lambda w: -w.num_bytes)


def dearest(totals: Iterable[Total]) -> list[Total]:
    """By tokens."""
    return sorted(totals, key=lambda t: (-t.lost_tokens, -t.turns, t.cause.value))


def tokens(num_bytes: int) -> int:
    """Estimated, at four bytes a token."""
    return -(-num_bytes // BYTES_A_TOKEN)


def _group(segment: str) -> str:
    """`message 7` and `message 9` are one place in a sum."""
    name, _, number = segment.partition(" ")
    return name if number.isdigit() else segment

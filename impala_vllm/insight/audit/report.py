"""What an audit found, summed up by cause."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from impala_vllm.insight.audit.causes import FIXES, Cause
from impala_vllm.insight.audit.schemas import Tool
from impala_vllm.workload.text_blocks import BYTES_A_TOKEN

MAX_WORST = 10


@dataclass(frozen=True, slots=True)
class Finding:
    """One turn that does not begin with the prompt before it."""

    session: str
    request_id: str
    turn: int
    """Counted from 1 within the session."""
    segment: str
    cause: Cause
    lost_tokens: int
    was: str | None = None
    now: str | None = None
    """Fragments around the first difference, only where asked for."""

    def document(self) -> dict[str, Any]:
        """As plain data."""
        found: dict[str, Any] = {
            "session": self.session,
            "request_id": self.request_id,
            "turn": self.turn,
            "segment": self.segment,
            "cause": self.cause.value,
            "lost_tokens": self.lost_tokens,
        }
        if self.now is not None:
            found |= {"was": self.was, "now": self.now}
        return found


@dataclass(slots=True)
class Total:
    """All findings of one cause."""

    cause: Cause
    turns: int = 0
    lost_tokens: int = 0
    sessions: set[int] = field(default_factory=set)
    """Hashes of their names."""
    segments: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Report:
    """The whole audit. Token counts are estimates where `estimated`."""

    estimated: bool
    requests: int = 0
    sessions: int = 0
    sessions_forgotten: int = 0
    resumed: int = 0
    """Turns that had a prompt before them in their session."""
    skipped: int = 0
    first_error: str | None = None
    prompt_tokens: int = 0
    totals: dict[Cause, Total] = field(default_factory=dict)
    worst: list[Finding] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)

    def skip(self, error: Exception) -> None:
        """Count what could not be read."""
        self.skipped += 1
        self.first_error = self.first_error or str(error)

    def note(self, finding: Finding) -> None:
        """Add one finding. O(1)."""
        total = self.totals.setdefault(finding.cause, Total(finding.cause))
        total.turns += 1
        total.lost_tokens += finding.lost_tokens
        total.sessions.add(hash(finding.session))
        total.segments[_group(finding.segment)] += 1
        self.worst = sorted([*self.worst, finding], key=lambda f: -f.lost_tokens)[:MAX_WORST]

    def causes(self) -> list[Total]:
        """Dearest first."""
        return sorted(self.totals.values(), key=lambda t: (-t.lost_tokens, -t.turns, t.cause.value))

    @property
    def lost_tokens(self) -> int:
        """Computed again, over all causes."""
        return sum(total.lost_tokens for total in self.totals.values())

    def never_called(self) -> list[Tool]:
        """Tools that were carried and not called once."""
        return [tool for tool in self.tools if not tool.num_calls]

    def document(self, price_per_mtok: float | None) -> dict[str, Any]:
        """As plain data; money only with a price."""
        return {
            "requests": self.requests,
            "sessions": self.sessions,
            "sessions_forgotten": self.sessions_forgotten,
            "resumed": self.resumed,
            "skipped": self.skipped,
            "first_error": self.first_error,
            "tokens_are_estimated": self.estimated,
            "prompt_tokens": self.prompt_tokens,
            "lost_tokens": self.lost_tokens,
            **_cost(self.lost_tokens, price_per_mtok),
            "causes": [
                {
                    "cause": total.cause.value,
                    "turns": total.turns,
                    "sessions": len(total.sessions),
                    "lost_tokens": total.lost_tokens,
                    **_cost(total.lost_tokens, price_per_mtok),
                    "segments": dict(total.segments.most_common()),
                    "fix": FIXES[total.cause],
                }
                for total in self.causes()
            ],
            "worst": [finding.document() for finding in self.worst],
            "tools": [
                {
                    "name": tool.name,
                    "schema_tokens": tokens(tool.schema_bytes),
                    "requests": tool.num_requests,
                    "calls": tool.num_calls,
                }
                for tool in self.tools
            ],
        }


def tokens(num_bytes: int) -> int:
    """Estimated, at four bytes a token."""
    return -(-num_bytes // BYTES_A_TOKEN)


def _cost(num: int, price_per_mtok: float | None) -> dict[str, float]:
    return {} if price_per_mtok is None else {"cost": round(num * price_per_mtok / 1e6, 6)}


def _group(segment: str) -> str:
    """`message 7` and `message 9` are one place in a sum."""
    name, _, number = segment.partition(" ")
    return name if number.isdigit() else segment

"""Whose request is whose where a log does not say: recognised online by the identity that the engine runs.

Ids that clients sent themselves count, as they do there. What the log names stays as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from impala_vllm.core.identity import Identity, IdentityConfig
from impala_vllm.core.types import TraceId
from impala_vllm.workload import Turn, links


@dataclass(frozen=True, slots=True)
class Recognised:
    """A log in which every request has a session."""

    turns: Sequence[Turn]
    num_requests: int = 0
    """Of those that named none."""
    num_sessions: int = 0
    """Found in them."""


def recognise(turns: Sequence[Turn]) -> Recognised:
    """Give a session to every turn that has none; `turns` are in order of arrival. Raises WorkloadError.

    A parent is the one that was believed last: what comes later says more.
    """
    unknown = [turn for turn in turns if turn.trace_id is None]
    if not unknown:
        return Recognised(turns)
    found = {turn.request_id: link for turn, link in links(unknown, Identity(IdentityConfig()))}
    parents = {link.trace_id: link.parent_trace_id for link in found.values()}
    named = [
        turn
        if turn.trace_id is not None
        else replace(
            turn,
            trace_id=_name(found[turn.request_id].trace_id),
            parent_trace_id=_name(parents[found[turn.request_id].trace_id]),
        )
        for turn in turns
    ]
    silent = [turn for turn in unknown if turn.session_id is None]
    return Recognised(named, len(silent), len({found[turn.request_id].trace_id for turn in silent}))


def _name(trace_id: TraceId | None) -> str | None:
    """Told apart from names that the log has."""
    return None if trace_id is None else f"recognised/{trace_id}"

"""How a finding names its session and segment, and what it shows of them."""

from impala_vllm.insight.audit import difference
from impala_vllm.insight.audit.compare import Prompt
from impala_vllm.insight.audit.segment import STEM_ROLES, Segment
from impala_vllm.insight.audit.sessions import Session

_FRAGMENT = 60
"""Characters shown of each side of a difference."""


def label(prompt: Prompt, segment: int | None) -> str:
    """`tools`, `system`, `message n` or `paragraph n`; messages are counted from 1, tools left out."""
    if segment is None:
        return "whole prompt"
    role = prompt.segments[segment].role
    if role in STEM_ROLES and all(s.role in STEM_ROLES for s in prompt.segments[:segment]):
        return "tools" if role == "tools" else "system"
    number = segment + 1 - sum(s.role == "tools" for s in prompt.segments[:segment])
    return f"paragraph {number}" if role == "paragraph" else f"message {number}"


def shown_name(session: Session) -> str:
    """Without the tenant."""
    return session.name.partition("\0")[2] or session.name


def fragments(was: Segment, now: Segment) -> tuple[str, str]:
    """What stands in both around the first difference."""
    at = max(difference.shared_chars(was.body, now.body) - _FRAGMENT // 3, 0)
    return was.body[at : at + _FRAGMENT], now.body[at : at + _FRAGMENT]

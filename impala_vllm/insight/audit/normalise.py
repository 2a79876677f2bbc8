"""Known nonces held fast: a clock or an id in a system prompt keeps the value it had in the session's first prompt.

For a gateway that may not change its clients, and for an audit of what that would save. It changes what the
model reads (the clock stands still), so nothing here runs unless it is asked for. Counts, and anything behind
the system prompt, are left alone.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from impala_vllm.insight.audit import difference, volatile
from impala_vllm.insight.audit.compare import Prompt
from impala_vllm.insight.audit.segment import STEM_ROLES, Segment


def messages(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """`now` with the system prompts of `before`, the session's last request, where only known nonces differ.

    What is changed is a copy. O(length of the system prompts).
    """
    held: list[Mapping[str, Any]] = list(now)
    stem = takewhile(
        lambda pair: pair[0].get("role") == pair[1].get("role") in STEM_ROLES, zip(before, now, strict=False)
    )
    for place, (old, new) in enumerate(stem):
        was, text = old.get("content"), new.get("content")
        if isinstance(was, str) and isinstance(text, str) and _is_same_but_for_nonces(was, text):
            held[place] = {**new, "content": was}
    return held


def prompt(before: Prompt, now: Prompt) -> Prompt | None:
    """The same for prompts of an audit; None where nothing changes."""
    held: list[Segment] = list(now.segments)
    stem = takewhile(
        lambda pair: pair[0].role == pair[1].role in STEM_ROLES, zip(before.segments, now.segments, strict=False)
    )
    for place, (old, new) in enumerate(stem):
        if old.exact != new.exact and old.images == new.images and _is_same_but_for_nonces(old.body, new.body):
            held[place] = old
    if all(a is b for a, b in zip(held, now.segments, strict=True)):
        return None
    return Prompt(tuple(held), now.model, now.salt, now.tail_chars, now.continued)


def _is_same_but_for_nonces(old: str, new: str) -> bool:
    return all(map(volatile.is_known_nonce, difference.runs(old, new)))

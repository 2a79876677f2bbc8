"""A prompt against the one before it: the first segment that differs, why, and what is computed again."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from impala_vllm.insight.audit.causes import Cause
from impala_vllm.insight.audit.prints import Print, same_bytes, similarity

_ALIKE = 0.5
"""Share of common words from which a message counts as an edit of another."""
_SURE = (Cause.WHITESPACE, Cause.JSON_KEYS, Cause.IMAGE)
"""What a message has in common with no other one by chance, whether or not it also stands elsewhere."""
_BEGUN_BYTES = 32
"""A message that begins with as much of another, and is half made of it, counts as an edit too."""
_ANCHOR_BYTES = 16
"""A shorter message ("yes") found again says nothing about where history continues."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What of a request decides its KV."""

    segments: tuple[Print, ...]
    model: str = ""
    salt: str = ""
    tail_chars: int | None = None
    """Of a rendered text: characters of its last segment, which the next prompt may continue."""
    continued: frozenset[int] = frozenset()
    """Of a rendered text: last segments (`exact`) of earlier prompts that it continues."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a prompt leaves the one before it."""

    segment: int | None
    """Index of the first segment that differs; None where everything is computed again (model, salt)."""
    cause: Cause
    lost_bytes: int
    """Text behind the divergence that was there before and is computed again."""


def shared(before: Prompt, now: Prompt) -> int:
    """Number of leading segments that are equal."""
    number = 0
    for a, b in zip(before.segments, now.segments, strict=False):
        if a.exact != b.exact and not (number == len(before.segments) - 1 and a.exact in now.continued):
            break
        number += 1
    return number


def num_bytes(segments: Iterable[Print]) -> int:
    """Of all of them."""
    return sum(s.num_bytes for s in segments)


def again(before: Sequence[Print], now: Sequence[Print]) -> int:
    """Bytes of `now` that `before` holds too, in any place, up to times, ids, numbers and the order of keys."""
    known = {h for s in before for h in (s.exact, s.numberless, s.canonical, s.spaceless)}
    return sum(s.num_bytes for s in now if s.exact in known or {s.numberless, s.canonical, s.spaceless} & known)


def compare(before: Prompt, now: Prompt) -> Divergence | None:
    """None where one prompt begins the other, or where `now` goes its own way and nothing is computed again."""
    at = shared(before, now)
    if (before.model, before.salt) != (now.model, now.salt):
        lost = num_bytes(now.segments[:at]) + again(before.segments[at:], now.segments[at:])
        cause = Cause.SALT if before.model == now.model else Cause.MODEL
        return Divergence(None, cause, lost) if lost else None
    if at in (len(before.segments), len(now.segments)):
        return None
    old, new = before.segments[at:], now.segments[at:]
    a, b = old[0], new[0]
    if now.tail_chars is not None and len(new) == 1 and b.cuts == a.cuts[: len(b.cuts)]:
        return None  # a rendered text that ends inside the one before it
    if a.role != b.role and "tools" in (a.role, b.role):
        lost = again(old, new)
        return Divergence(at, Cause.TOOLS_CHANGED, lost) if lost else None
    rest = again(old, new[1:])
    cause = _changed(a, b)
    if cause in _SURE or not (_holds(old[1:], b) or _holds(new[1:], a)):
        if cause is not None:
            return Divergence(at, cause, b.num_bytes - same_bytes(a, b) + rest)
    elif _holds(new[1:], a):
        return Divergence(at, Cause.INSERTED, rest)
    else:
        return Divergence(at, Cause.TRIMMED, b.num_bytes + rest)
    return _replaced(at, old, new)


def _replaced(at: int, old: Sequence[Print], new: Sequence[Print]) -> Divergence | None:
    """The first of `new` is neither in `old` nor a variant of its first: an edit, a summary, or another task."""
    places = {s.exact: place for place, s in reversed(list(enumerate(old))) if place and s.num_bytes >= _ANCHOR_BYTES}
    rest = again(old[1:], new[1:])
    for added, segment in enumerate(new):
        dropped = places.get(segment.exact)
        if dropped is None:
            continue
        kept = _kept(old[0], new[0])
        if at == 0 and not kept and not new[0].is_summary:
            return Divergence(at, Cause.HEAD, rest)
        if dropped >= 2 and dropped > added:
            return Divergence(at, Cause.COMPACTED, rest)
        in_place = dropped == added == 1 and 2 * new[0].num_bytes < old[0].num_bytes
        return Divergence(at, Cause.TRIMMED if in_place else Cause.EDITED, rest + kept)
    if new[0].is_summary and len(old) >= 2 and num_bytes(new) < num_bytes(old):
        return Divergence(at, Cause.COMPACTED, rest)
    kept = _kept(old[0], new[0])
    cause = Cause.TRIMMED if 2 * new[0].num_bytes < old[0].num_bytes else Cause.EDITED
    return Divergence(at, cause, rest + kept) if kept else None


def _kept(a: Print, b: Print) -> int:
    """Bytes of `b` behind the first difference if it is an edit of `a`, else 0."""
    same = same_bytes(a, b)
    begun = same >= _BEGUN_BYTES and 2 * same >= b.num_bytes
    same_call = a.fields is not None and a.fields == b.fields
    alike = a.role == b.role and (begun or same_call or similarity(a, b) >= _ALIKE)
    return max(b.num_bytes - same, 1) if alike else 0


def _holds(segments: Sequence[Print], wanted: Print) -> bool:
    return wanted.num_bytes >= _ANCHOR_BYTES and any(s.exact == wanted.exact for s in segments)


def _changed(a: Print, b: Print) -> Cause | None:
    """Why two segments in the same place differ, if one is a variant of the other."""
    if a.role == b.role == "tools":
        if a.members == b.members:
            return Cause.JSON_KEYS if a.canonical == b.canonical else Cause.TOOLS_REORDERED
        if a.numberless != b.numberless:
            return Cause.TOOLS_CHANGED
    for respect, cause in (
        ("imageless", Cause.IMAGE),
        ("spaceless", Cause.WHITESPACE),
        ("canonical", Cause.JSON_KEYS),
        ("timeless", Cause.TIMESTAMP),
        ("nameless", Cause.NONCE),
        ("numberless", Cause.COUNTER),
        ("bag", Cause.JSON_KEYS),
    ):
        if getattr(a, respect) == getattr(b, respect):
            return cause
    if a.content is not None and a.content == b.content:
        return Cause.RERENDERED
    return None

"""A prompt against the one before it: the first segment that differs, why, and what is computed again."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from impala_vllm.insight.audit import difference, volatile
from impala_vllm.insight.audit.causes import Cause
from impala_vllm.insight.audit.segment import Segment, similarity

_ALIKE = 0.5
"""Share of common words from which a message counts as an edit of another."""
_SURE = (Cause.WHITESPACE, Cause.JSON_KEYS, Cause.IMAGE)
"""What a message has in common with no other one by chance, whether or not it also stands elsewhere."""
_BEGUN_CHARS = 32
"""A message that begins with as much of another, and is half made of it, counts as an edit too."""
_ANCHOR_BYTES = 16
"""A shorter message ("yes") found again says nothing about where history continues."""
_DOCUMENT_BYTES = 256
"""A text of this length is the same text whoever says it."""


@dataclass(slots=True)
class Prompt:
    """What of a request decides its KV, and what came of it."""

    segments: tuple[Segment, ...]
    model: str = ""
    salt: str = ""
    tail_chars: int | None = None
    """Of a rendered text: characters of its last segment, which the next prompt may continue."""
    continued: frozenset[int] = frozenset()
    """Of a rendered text: last segments (`exact`) of earlier prompts that it continues."""
    answer: Segment | None = None
    """As it should stand in the next prompt, where the log has it."""
    is_changed: bool = False
    """Whether a later prompt goes on from it with another history: what comes then is compared with that one."""
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_bytes = num_bytes(self.segments)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a prompt leaves the one before it."""

    segment: int | None
    """Index of the first segment that differs; None where everything is computed again (model, salt)."""
    cause: Cause
    shared_bytes: int
    """What both begin with."""
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


def num_bytes(segments: Iterable[Segment]) -> int:
    """Of all of them."""
    return sum(s.num_bytes for s in segments)


def again(before: Sequence[Segment], now: Sequence[Segment]) -> int:
    """Bytes of `now` that `before` holds too, in any place and role, up to times, ids, numbers and order of keys."""
    known = {s.exact for s in before}
    same = sum(s.num_bytes for s in now if s.exact in known)
    there = {s.exact for s in now}
    new = [s for s in now if s.exact not in known]
    old = [s for s in before if s.exact not in there]
    if new and old:
        documents = {s.contents for s in old if s.contents and s.num_bytes >= _DOCUMENT_BYTES}
        place = 0
        for segment in new:
            found = _variant_in(old, segment, place)
            place = place if found is None else found + 1
            if found is not None or (segment.contents or 0) in documents:
                same += segment.num_bytes
    return same


def _variant_in(old: Sequence[Segment], wanted: Segment, place: int) -> int | None:
    """Where a variant of `wanted` is. From `place` on first: a history that was changed throughout is in order."""
    for index in chain(range(place, len(old)), range(place)):
        if _is_variant(wanted, old[index]):
            return index
    return None


def _is_variant(a: Segment, b: Segment) -> bool:
    """Up to times, ids, numbers, keys and spaces. Looks at texts only where they are about as long."""
    if not 0.7 <= (a.num_bytes + 16) / (b.num_bytes + 16) <= 1.4:
        return False
    if a.spaceless == b.spaceless or (a.body[:1] in "{[" and a.canonical == b.canonical):
        return True
    if a.role != b.role or not difference.ends_alike(a.body, b.body):
        return False
    return volatile.all_are(difference.runs(a.body, b.body))


def compare(before: Prompt, now: Prompt) -> Divergence | None:
    """None where one prompt begins the other, or where `now` goes its own way and nothing is computed again."""
    at = shared(before, now)
    leading = num_bytes(now.segments[:at])
    if (before.model, before.salt) != (now.model, now.salt):
        lost = leading + again(before.segments[at:], now.segments[at:])
        cause = Cause.SALT if before.model == now.model else Cause.MODEL
        return Divergence(None, cause, 0, lost) if lost else None
    if at in (len(before.segments), len(now.segments)):
        return None
    old, new = before.segments[at:], now.segments[at:]
    a, b = old[0], new[0]
    if now.tail_chars is not None and len(new) == 1 and a.body.startswith(b.body):
        return None  # a rendered text that ends inside the one before it
    same = _same_bytes(a, b)

    def found(cause: Cause, lost: int) -> Divergence:
        return Divergence(at, cause, leading + same, lost)

    if a.role != b.role and "tools" in (a.role, b.role):
        lost = again(old, new)
        return found(Cause.TOOLS_CHANGED, lost) if lost else None
    rest = again(old, new[1:])
    cause = _changed(a, b)
    if cause in _SURE or not (_holds(old[1:], b) or _holds(new[1:], a)):
        if cause is not None:
            return found(cause, _behind(a, b) + rest)
    elif _holds(new[1:], a):
        return found(Cause.INSERTED, rest)
    else:
        return found(Cause.TRIMMED, b.num_bytes + rest)
    replaced = _replaced(at, old, new)
    return None if replaced is None else found(*replaced)


def variant(a: Segment, b: Segment) -> tuple[Cause, int] | None:
    """Why `b` differs from `a`, if it is a variant or an edit of it, and its bytes behind the first difference."""
    cause = _changed(a, b)
    if cause is not None:
        return cause, max(_behind(a, b), 1)
    kept = _kept(a, b)
    return (Cause.TRIMMED if _is_cut(a, b) else Cause.EDITED, kept) if kept else None


def _replaced(at: int, old: Sequence[Segment], new: Sequence[Segment]) -> tuple[Cause, int] | None:
    """The first of `new` is neither in `old` nor a variant of its first: an edit, a summary, or another task."""
    places = {s.exact: place for place, s in reversed(list(enumerate(old))) if place and s.num_bytes >= _ANCHOR_BYTES}
    rest = again(old[1:], new[1:])
    for added, segment in enumerate(new):
        dropped = places.get(segment.exact)
        if dropped is None:
            continue
        kept = _kept(old[0], new[0])
        if at == 0 and not kept and not new[0].is_summary:
            return Cause.HEAD, rest
        if dropped >= 2 and dropped > added:
            return Cause.COMPACTED, rest
        return Cause.TRIMMED if dropped == added == 1 and _is_cut(old[0], new[0]) else Cause.EDITED, rest + kept
    if new[0].is_summary and len(old) >= 2 and num_bytes(new) < num_bytes(old):
        return Cause.COMPACTED, rest
    kept = _kept(old[0], new[0])
    if kept:
        return Cause.TRIMMED if _is_cut(old[0], new[0]) else Cause.EDITED, rest + kept
    elsewhere = 0 if at else again(old, new)
    return (Cause.HEAD, elsewhere) if elsewhere >= _DOCUMENT_BYTES else None


def _is_cut(a: Segment, b: Segment) -> bool:
    return 2 * b.num_bytes < a.num_bytes


def _kept(a: Segment, b: Segment) -> int:
    """Bytes of `b` behind the first difference if it is an edit of `a`, else 0."""
    same = _same_bytes(a, b)
    begun = same >= _BEGUN_CHARS and 2 * same >= b.num_bytes
    same_call = a.fields is not None and a.fields == b.fields
    alike = a.role == b.role and (begun or same_call or similarity(a, b) >= _ALIKE)
    return max(_behind(a, b), 1) if alike else 0


def _behind(a: Segment, b: Segment) -> int:
    """Bytes of `b` behind the first difference that `a` has too."""
    if a.images != b.images or a.role != b.role or a.bag == b.bag or a.spaceless == b.spaceless:
        return b.num_bytes - _same_bytes(a, b)
    runs = list(difference.runs(a.body, b.body))
    fresh = "".join(run.new for run in runs)
    return len(b.body[runs[0].start :].encode(errors="surrogatepass")) - len(fresh.encode(errors="surrogatepass"))


def _same_bytes(a: Segment, b: Segment) -> int:
    """Leading bytes that both have."""
    if a.role != b.role:
        return 0
    return len(b.body[: difference.shared_chars(a.body, b.body)].encode(errors="surrogatepass"))


def _holds(segments: Sequence[Segment], wanted: Segment) -> bool:
    return wanted.num_bytes >= _ANCHOR_BYTES and any(s.exact == wanted.exact for s in segments)


def _changed(a: Segment, b: Segment) -> Cause | None:
    """Why two segments in the same place differ, if one is a variant of the other."""
    if a.role == b.role == "tools":
        if a.members == b.members:
            return Cause.JSON_KEYS if a.canonical == b.canonical else Cause.TOOLS_REORDERED
        return _stamped(a, b) or Cause.TOOLS_CHANGED
    if a.imageless == b.imageless:
        return Cause.IMAGE
    if a.spaceless == b.spaceless:
        return Cause.WHITESPACE
    if a.canonical == b.canonical:
        return Cause.RERENDERED if a.ordered == b.ordered else Cause.JSON_KEYS
    if a.contents is not None and a.contents == b.contents:
        return Cause.RERENDERED
    stamp = _stamped(a, b)
    if stamp is not None:
        return stamp
    if a.bag == b.bag:
        return Cause.JSON_KEYS
    return Cause.RERENDERED if a.rendering is not None and a.rendering == b.rendering else None


def _stamped(a: Segment, b: Segment) -> Cause | None:
    """A time, id or count, if that is the first thing that differs and most else is equal."""
    if a.role != b.role:
        return None
    runs = list(difference.runs(a.body, b.body))
    changed = sum(max(len(run.old), len(run.new)) for run in runs)
    return volatile.cause(runs) if 2 * changed <= max(len(a.body), len(b.body)) else None

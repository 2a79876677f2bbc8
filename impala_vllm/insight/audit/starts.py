"""First prompts of sessions against each other: what all sessions of a program could share, and why they do not."""

from collections import OrderedDict
from collections.abc import Reversible
from dataclasses import dataclass

from impala_vllm.insight.audit import difference, volatile
from impala_vllm.insight.audit.causes import Cause
from impala_vllm.insight.audit.compare import Prompt, compare
from impala_vllm.insight.audit.segment import STEM_ROLES, Segment, similarity

MAX_STEMS = 32
"""Stems remembered of one tenant and model; the least recently seen goes first."""
MAX_PLACES = 256
_ALIKE = 0.4
"""Share of common words from which two stems count as versions of one."""
_SAME = 0.9
"""From this share on no other is looked for."""
_LEAST_BYTES = 256
_LEAST_SHARE = 0.25
"""Less than this behind the first difference is not worth a line."""


@dataclass(frozen=True, slots=True)
class Start:
    """A first prompt that could have begun like an earlier session's."""

    segment: int
    cause: Cause
    lost_bytes: int
    was: Segment
    now: Segment


class Starts:
    """Remembers stems: tools and system prompt, or the whole first prompt where nothing says what those are."""

    def __init__(self) -> None:
        self._stems: OrderedDict[tuple[str, str], OrderedDict[tuple[int, ...], tuple[Segment, ...]]] = OrderedDict()

    def first(self, tenant: str, prompt: Prompt) -> Start | None:
        """A session begins with `prompt`."""
        stem = _stem(prompt)
        if not stem:
            return None
        place = (tenant, prompt.model)
        stems = self._stems.setdefault(place, OrderedDict())
        self._stems.move_to_end(place)
        key = tuple(s.exact for s in stem)
        found = None
        if key not in stems:
            before = _nearest(stems.values(), stem)
            found = None if before is None else _lost(before, stem)
        stems[key] = stem
        stems.move_to_end(key)
        if len(stems) > MAX_STEMS:
            stems.popitem(last=False)
        if len(self._stems) > MAX_PLACES:
            self._stems.popitem(last=False)
        return found


def _stem(prompt: Prompt) -> tuple[Segment, ...]:
    number = 0
    while number < len(prompt.segments) and prompt.segments[number].role in STEM_ROLES:
        number += 1
    if number:
        return prompt.segments[:number]
    return prompt.segments if prompt.tail_chars is not None else ()


def _nearest(stems: Reversible[tuple[Segment, ...]], stem: tuple[Segment, ...]) -> tuple[Segment, ...] | None:
    """The latest that is the same but for little, else the one that is most alike; None where none is."""
    best, most = None, _ALIKE
    for other in reversed(stems):
        alike = _alike(other, stem)
        if alike > most:
            best, most = other, alike
        if alike > _SAME:
            break
    return best


def _alike(a: tuple[Segment, ...], b: tuple[Segment, ...]) -> float:
    """Over segments of the same place, by their size."""
    pairs = [(similarity(x, y) if x.exact != y.exact else 1.0, y.num_bytes) for x, y in zip(a, b, strict=False)]
    most = max(sum(s.num_bytes for s in a), sum(s.num_bytes for s in b))
    return sum(share * size for share, size in pairs) / most if most else 0.0


def _lost(before: tuple[Segment, ...], stem: tuple[Segment, ...]) -> Start | None:
    divergence = compare(Prompt(before), Prompt(stem))
    at = next((i for i, (a, b) in enumerate(zip(before, stem, strict=False)) if a.exact != b.exact), None)
    if at is None:
        return None
    old, new = "".join(s.body for s in before[at:]), "".join(s.body for s in stem[at:])
    runs = list(difference.runs(old, new))
    if not runs:
        return None
    lost = len(new) - runs[0].start - sum(len(run.new) for run in runs)
    if lost < max(_LEAST_BYTES, _LEAST_SHARE * sum(s.num_bytes for s in stem)):
        return None
    known = (Cause.TOOLS_REORDERED, Cause.TOOLS_CHANGED, Cause.JSON_KEYS, Cause.WHITESPACE)
    if divergence is not None and divergence.cause in known:
        cause = divergence.cause
    else:
        cause = volatile.cause(runs) or Cause.LEADING
        cause = Cause.LEADING if cause is Cause.COUNTER else cause
    return Start(at, cause, lost, before[at], stem[at])

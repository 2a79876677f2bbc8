"""Where two texts differ: the places, with what stands around them. O(length) for texts that are alike.

No shortest script of edits: after a difference the next few words of one text are looked for in the
other, which finds stamps, insertions and cuts, and is quick where a general diff is not.
"""

from collections.abc import Iterator
from dataclasses import dataclass

MAX_RUNS = 64
"""After so many the rest counts as one difference."""
_ANCHOR = 20
"""Characters that must agree to go on in step."""
_AHEAD = 4000
"""How far to look for them."""
_TRIES = 60
"""Words of the old text that may be gone before what follows is found again."""
_CONTEXT = 40
_EDGES = frozenset(" \t\r\n\"'`,;=()[]{}<>|\x1f")


@dataclass(frozen=True, slots=True)
class Run:
    """One place where they differ. Starts at the start of a word."""

    before: str
    """Up to 40 characters of the same line in front."""
    old: str
    new: str
    after: str
    """Up to 40 characters that both have behind, of the same line."""
    start: int
    """In the new text."""


def runs(old: str, new: str) -> Iterator[Run]:
    """Every place, first to last."""
    i = j = 0
    for number in range(MAX_RUNS + 1):
        same = _common_prefix(old, new, i, j)
        if i + same >= len(old) and j + same >= len(new):
            return
        i, j = i + same, j + same
        back = _to_word(new, j, same)
        i, j = i - back, j - back
        step = _step(old, new, i, j) if number < MAX_RUNS else None
        if step is None:  # they meet at the common end, from its first whole word on
            end = min(_common_suffix(old, new), len(old) - i, len(new) - j)
            end -= min(_from_word(new, len(new) - end), end)
            step = len(old) - end, len(new) - end
            number = MAX_RUNS
        a, b = step
        line = new.rfind("\n", 0, j) + 1
        after = new[b : b + _CONTEXT].partition("\n")[0]
        yield Run(new[max(line, j - _CONTEXT) : j], old[i:a], new[j:b], after, j)
        if number == MAX_RUNS:
            return
        i, j = a, b


def shared_chars(old: str, new: str) -> int:
    """Leading characters that both have."""
    return _common_prefix(old, new, 0, 0)


def ends_alike(old: str, new: str) -> bool:
    """Whether the start or the end is the same for an eighth of the shorter one. Quick: no place is looked for."""
    eighth = max(min(len(old), len(new)) // 8, 1)
    return old[:eighth] == new[:eighth] or old[-eighth:] == new[-eighth:]


def _step(old: str, new: str, i: int, j: int) -> tuple[int, int] | None:
    """The next places from which they agree again."""
    a = i
    for _ in range(_TRIES):
        anchor = old[a : a + _ANCHOR]
        if len(anchor) < _ANCHOR:
            return None
        b = new.find(anchor, j, j + _AHEAD)
        if b >= 0 and (a, b) != (i, j):
            return a, b
        a = _next_word(old, a)
    return None


def _next_word(text: str, at: int) -> int:
    while at < len(text) and text[at] not in _EDGES:
        at += 1
    while at < len(text) and text[at] in _EDGES:
        at += 1
    return at


def _to_word(text: str, at: int, most: int) -> int:
    """Characters back to the start of the word."""
    back = 0
    while back < min(most, _CONTEXT) and text[at - back - 1] not in _EDGES:
        back += 1
    return back


def _from_word(text: str, at: int) -> int:
    """Characters on to the end of the word."""
    forth = 0
    while at + forth < len(text) and forth < _CONTEXT and text[at + forth] not in _EDGES:
        forth += 1
    return forth


def _common_prefix(a: str, b: str, i: int, j: int) -> int:
    """By halves: a comparison of slices is quick. O(length of what is common)."""
    most = min(len(a) - i, len(b) - j)
    low, width = 0, 64
    while low < most and a[i + low : i + low + width] == b[j + low : j + low + width]:
        low += width
        width *= 2
    high = min(low + width, most)
    low = min(low, most)
    while low < high:
        middle = (low + high + 1) // 2
        if a[i + low : i + middle] == b[j + low : j + middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _common_suffix(a: str, b: str) -> int:
    most = min(len(a), len(b))
    low, width = 0, 64
    while low < most and a[-low - width : len(a) - low] == b[-low - width : len(b) - low]:
        low += width
        width *= 2
    high = min(low + width, most)
    low = min(low, most)
    while low < high:
        middle = (low + high + 1) // 2
        if a[len(a) - middle : len(a) - low] == b[len(b) - middle : len(b) - low]:
            low = middle
        else:
            high = middle - 1
    return low

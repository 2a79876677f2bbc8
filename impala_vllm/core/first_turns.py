"""Will a trace that has just begun have a second turn? Learned by kind of agent, so that one-shot traffic is known.

A kind is the stem a trace starts with. A first turn that asks for a tool speaks for a second one, one that does not
against it, and a second turn that comes all the same corrects that.
"""

from collections.abc import Hashable

MIN_SEEN = 2.5
"""First turns that have to have ended, about three, before a kind is known. Of a thousand jobs that arrive at once none
has ended when the others are computed."""
MEMORY = 50.0
"""First turns after which an observation's weight has fallen to 1/e."""
MAX_KINDS = 1024
"""The kind not seen for longest goes first."""


class FirstTurns:
    """Chances by kind. O(1)."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, list[float]] = {}

    def saw(self, kind: Hashable, has_second: bool) -> None:
        """A first turn of this kind has ended, and will or will not be followed, as far as can be told."""
        counts = self._kinds.pop(kind, None) or [0.0, 0.0]
        keep = 1.0 - 1.0 / MEMORY
        counts[0] = keep * counts[0] + has_second
        counts[1] = keep * counts[1] + 1.0
        self._kinds[kind] = counts
        if len(self._kinds) > MAX_KINDS:
            del self._kinds[next(iter(self._kinds))]

    def came_back(self, kind: Hashable) -> None:
        """A first turn that was counted as the last one was followed after all."""
        if (counts := self._kinds.get(kind)) is not None:
            counts[0] = min(counts[1], counts[0] + 1.0)

    def chance(self, kind: Hashable) -> float | None:
        """That a trace of this kind has a second turn. None: too few were seen."""
        followed, seen = self._kinds.get(kind, (0.0, 0.0))
        return followed / seen if seen >= MIN_SEEN else None

"""Will a trace that has just begun have a second turn? Learned by kind of agent, so that one-shot traffic is known.

A kind is the stem a trace starts with. A first turn that asks for a tool speaks for a second one, a plain answer
against it; one that ended without a word about it speaks against it once it has been silent for a while. A second turn
that comes all the same corrects that.
"""

from collections import deque
from collections.abc import Hashable

MIN_SEEN = 2.5
"""First turns that have to have ended, about three, before a kind is known. Of a thousand jobs that arrive at once none
has ended when the others are computed."""
MEMORY = 50.0
"""First turns after which an observation's weight has fallen to 1/e."""
MAX_KINDS = 1024
"""The kind not seen for longest goes first."""
QUIET_S = 120.0
"""Silence that speaks against a second turn: people take minutes. Of what mooncake's prompts could find at 4x (three
seeds, simulated) they found 64 to 87 % with 30 s, 95 % or more with 60 s, 99 % or more with 120 s."""
MAX_QUIET = 4096
"""Silent first turns that are remembered; beyond that the oldest speaks at once."""


class FirstTurns:
    """Chances by kind. O(1), but for silences that are over: O(those)."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, list[float]] = {}
        """Followed and seen. Who comes back before silence speaks is followed before it is seen."""
        self._quiet: deque[tuple[float, Hashable]] = deque()
        """When those that said nothing speak, and their kinds."""

    def saw(self, kind: Hashable, has_second: bool) -> None:
        """A first turn of this kind has ended, and will or will not be followed, as far as can be told."""
        counts = self._counts(kind)
        keep = 1.0 - 1.0 / MEMORY
        counts[0] = keep * counts[0] + has_second
        counts[1] = keep * counts[1] + 1.0

    def said_nothing(self, kind: Hashable, now: float) -> None:
        """A first turn of this kind has ended, and how does not tell whether it will be followed."""
        self._quiet.append((now + QUIET_S, kind))

    def listen(self, now: float) -> None:
        """Count the silences that are over."""
        while self._quiet and (self._quiet[0][0] <= now or len(self._quiet) > MAX_QUIET):
            self.saw(self._quiet.popleft()[1], has_second=False)

    def came_back(self, kind: Hashable) -> None:
        """A first turn that was, or will be, counted as the last one was followed after all."""
        self._counts(kind)[0] += 1.0

    def chance(self, kind: Hashable) -> float | None:
        """That a trace of this kind has a second turn. None: too few were seen."""
        followed, seen = self._kinds.get(kind, (0.0, 0.0))
        return min(1.0, followed / seen) if seen >= MIN_SEEN else None

    def _counts(self, kind: Hashable) -> list[float]:
        counts = self._kinds[kind] = self._kinds.pop(kind, None) or [0.0, 0.0]
        if len(self._kinds) > MAX_KINDS:
            del self._kinds[next(iter(self._kinds))]
        return counts

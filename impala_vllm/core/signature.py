"""Which tool did a turn call? A name for it, learned from token ids alone.

The tokens after a tool-call marker begin with what every call has in common (`{"name": "`), then the tool's name,
then its arguments. Where the name ends differs by format and tokenizer, so it is learned: a signature is the
longest beginning that was seen often enough to learn gaps from.
"""

from collections.abc import Sequence


class Signatures:
    """Counts beginnings of calls. O(window) a call; bounded: the beginnings seen longest ago go first."""

    def __init__(self, window: int = 12, min_seen: int = 6, max_beginnings: int = 8192) -> None:
        """Look at `window` tokens; a beginning counts once it was seen `min_seen` times."""
        self._window = window
        self._min_seen = min_seen
        self._max_beginnings = max_beginnings
        self._seen: dict[tuple[int, ...], int] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def of(self, tokens: Sequence[int]) -> str | None:
        """The signature of a call whose tokens after the marker are `tokens`; None until one is known."""
        best: tuple[int, ...] | None = None
        seen = self._seen
        for length in range(1, min(len(tokens), self._window) + 1):
            beginning = tuple(tokens[:length])
            count = seen.pop(beginning, 0) + 1
            seen[beginning] = count
            if count >= self._min_seen:
                best = beginning
        while len(seen) > self._max_beginnings:
            del seen[next(iter(seen))]
        return None if best is None else "tool:" + ".".join(map(str, best))

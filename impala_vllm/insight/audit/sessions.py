"""The prompts a turn may follow: a few of each session, as fingerprints, for as many sessions as there is room.

A session is no line: sub-agents and title calls come between turns. So each prompt is compared with the
one that it shares the most with, which is also what a prefix cache would find.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from impala_vllm.insight.audit.compare import Prompt, again, num_bytes, shared
from impala_vllm.insight.audit.prints import Print

MAX_HEADS = 8
"""Prompts kept a session."""
MAX_PRINTS = 200_000
"""Fingerprints kept over all sessions, about 2 KB each; the least recently used sessions go first."""


class Before(NamedTuple):
    """What a turn follows."""

    prompt: Prompt
    cached_bytes: int
    """What of the turn another prompt of the session leaves in the cache of the turn's own model."""


class Session:
    """The last prompts of one session, and what is known of their raw messages."""

    def __init__(self) -> None:
        self.num_turns = 0
        self.known: dict[int, Print] = {}
        """Fingerprints of messages by the hash of their bytes in the log: of the kept prompts only."""
        self._heads: list[tuple[Prompt, dict[int, Print]]] = []

    def before(self, now: Prompt) -> Before | None:
        """The prompt that `now` follows; None where it follows none. O(heads x segments)."""
        best: tuple[tuple[int, int, bool, int], Prompt] | None = None
        cached = 0
        if self._heads and self._continues(self._heads[-1][0], now):
            return Before(self._heads[-1][0], num_bytes(now.segments))
        for age, (head, _) in enumerate(self._heads):
            at = shared(head, now)
            leading = num_bytes(now.segments[:at])
            same = (head.model, head.salt) == (now.model, now.salt)
            whole = at in (len(head.segments), len(now.segments))
            rest = 0 if whole else again(head.segments[at:], now.segments[at:])
            if same:
                cached = max(cached, leading)
            score = (leading, rest, same, age)
            if leading + rest and (best is None or score > best[0]):
                best = (score, head)
        return Before(best[1], cached) if best else None

    def tails(self) -> Iterator[Prompt]:
        """The prompts that were rendered text: what comes next may begin inside their last segment."""
        return (head for head, _ in self._heads if head.tail_chars is not None)

    def add(self, now: Prompt, raws: dict[int, Print]) -> None:
        """Keep it, in place of a prompt that it continues; `raws` are its messages by hash."""
        self.num_turns += 1
        self._heads = [(head, known) for head, known in self._heads if not self._continues(head, now)]
        self._heads = [*self._heads, (now, raws)][-MAX_HEADS:]
        self.known = {h: p for _, known in self._heads for h, p in known.items()}

    def _continues(self, head: Prompt, now: Prompt) -> bool:
        same = (head.model, head.salt) == (now.model, now.salt)
        return same and shared(head, now) == len(head.segments)


class Sessions:
    """Sessions by name, bounded."""

    def __init__(self, max_prints: int = MAX_PRINTS) -> None:
        self.num_seen = 0
        self.num_forgotten = 0
        self._max_prints = max_prints
        self._num_prints = 0
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._sizes: dict[str, int] = {}

    def get(self, name: str) -> Session:
        """The session, made if there is none."""
        session = self._sessions.get(name)
        if session is None:
            session = self._sessions[name] = Session()
            self.num_seen += 1
        self._sessions.move_to_end(name)
        return session

    def settle(self, name: str) -> None:
        """After a turn of it: forget others where there is no room."""
        size = len(self._sessions[name].known)
        self._num_prints += size - self._sizes.get(name, 0)
        self._sizes[name] = size
        while self._num_prints > self._max_prints and len(self._sessions) > 1:
            old, _ = self._sessions.popitem(last=False)
            self._num_prints -= self._sizes.pop(old)
            self.num_forgotten += 1

"""The prompts a turn may follow: a few of each session, for as many sessions as there is room.

A session is no line: sub-agents and title calls come between turns. So each prompt is compared with the
one that it shares the most with, which is also what a prefix cache would find.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from impala_vllm.insight.audit.compare import Prompt, again, num_bytes, shared
from impala_vllm.insight.audit.segment import Segment

MAX_HEADS = 8
"""Prompts kept a session."""
MAX_BYTES = 256 << 20
"""Of segments kept over all sessions; the least recently used sessions go first."""
_APART_BYTES = 256
"""So much more than a prefix must another prompt have in common with a turn to be worth a comparison."""


class Before(NamedTuple):
    """What a turn follows."""

    prompt: Prompt
    cached_bytes: int
    """What of the turn some prompt of the session leaves in the cache of the turn's own model."""
    other: Prompt | None = None
    """A prompt that holds more of the turn than `prompt`, which begins it."""


class Session:
    """The last prompts of one session, and what is known of their raw messages."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.num_turns = 0
        self.lost_tokens = 0
        self.num_findings = 0
        self.repeated_bytes = 0
        """Of its last prompt: what stands in it a second time."""
        self.known: dict[int, Segment] = {}
        """Segments of the kept prompts by the hash of their bytes in the log."""
        self._heads: list[tuple[Prompt, dict[int, Segment]]] = []

    def before(self, now: Prompt) -> Before | None:
        """The prompt that `now` follows; None where it follows none. O(heads x segments)."""
        if len(self._heads) == 1 and self._continues(self._heads[0][0], now):
            head = self._heads[0][0]
            return Before(head, num_bytes(now.segments[: shared(head, now)]))
        best: tuple[tuple[bool, int, bool, int], Prompt] | None = None
        most: tuple[int, Prompt] | None = None
        cached = 0
        for age, (head, _) in enumerate(reversed(self._heads)):
            at = shared(head, now)
            leading = num_bytes(now.segments[:at])
            same = (head.model, head.salt) == (now.model, now.salt)
            if same:
                cached = max(cached, leading)
            whole = at in (len(head.segments), len(now.segments))
            if not whole and best is not None and head.num_bytes < best[0][1]:
                continue  # it cannot hold more of the turn than the best so far
            rest = 0 if whole else again(head.segments[at:], now.segments[at:])
            if same and not head.is_changed and (most is None or leading + rest > most[0]):
                most = leading + rest, head
            score = (whole, leading + rest, same, -age)
            if leading + rest and (best is None or score > best[0]):
                best = (score, head)
        if best is None:
            return None
        other = most[1] if best[0][0] and most is not None and most[0] > cached + _APART_BYTES else None
        return Before(best[1], cached, other)

    def heads(self) -> Iterator[Prompt]:
        """The prompts kept, latest last."""
        return (head for head, _ in self._heads)

    def add(self, now: Prompt, raws: dict[int, Segment]) -> None:
        """Keep it, in place of a prompt that it continues; `raws` are its messages by hash."""
        self.num_turns += 1
        self._heads = [(head, known) for head, known in self._heads if not self._continues(head, now)]
        self._heads = [*self._heads, (now, raws)][-MAX_HEADS:]
        self.known = {h: p for _, known in self._heads for h, p in known.items()}

    def _continues(self, head: Prompt, now: Prompt) -> bool:
        same = (head.model, head.salt) == (now.model, now.salt)
        return same and shared(head, now) == len(head.segments)


class Sessions:
    """Sessions by name, bounded. `on_end` is told of each that is forgotten, and at `close` of the others."""

    def __init__(self, on_end: Callable[[Session], None] = lambda _: None, max_bytes: int = MAX_BYTES) -> None:
        self.num_seen = 0
        self.num_forgotten = 0
        self._on_end = on_end
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._sizes: dict[str, int] = {}

    def get(self, name: str) -> Session:
        """The session, made if there is none."""
        session = self._sessions.get(name)
        if session is None:
            session = self._sessions[name] = Session(name)
            self.num_seen += 1
        self._sessions.move_to_end(name)
        return session

    def find(self, name: str) -> Session | None:
        """The session, if it is still known."""
        return self._sessions.get(name)

    def settle(self, name: str) -> None:
        """After a turn of it: forget others where there is no room."""
        size = sum(segment.held_bytes for segment in self._sessions[name].known.values())
        self._num_bytes += size - self._sizes.get(name, 0)
        self._sizes[name] = size
        while self._num_bytes > self._max_bytes and len(self._sessions) > 1:
            old, session = self._sessions.popitem(last=False)
            self._num_bytes -= self._sizes.pop(old)
            self.num_forgotten += 1
            self._on_end(session)

    def close(self) -> None:
        """End what is left."""
        for session in self._sessions.values():
            self._on_end(session)
        self._sessions.clear()
        self._sizes.clear()
        self._num_bytes = 0

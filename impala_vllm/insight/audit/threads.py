"""Whose turn a request without a session id is: the session whose last prompts hold most of what was said.

Not by its prefix, as the engine does it: what an audit looks for is a prefix that broke. A message finds
its session again by its bytes, or by its letters alone where all of a history was spaced or dated anew.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from impala_vllm.insight.audit.compare import Prompt
from impala_vllm.insight.audit.requests import Request
from impala_vllm.insight.audit.segment import STEM_ROLES, Segment
from impala_vllm.insight.audit.sessions import Session, Sessions

_LEAST_BYTES = 24
"""A shorter message is said everywhere."""


class Threads:
    """Recognises sessions. Memory: two entries a message of the prompts that `Sessions` keeps."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._owners: dict[int, str] = {}
        """Latest session that holds a message, by the hash of its bytes and of what it may not leave."""
        self._letters: dict[int, str] = {}
        self._held: dict[str, tuple[set[int], set[int]]] = {}
        self._num_made = 0

    def by_bytes(self, request: Request) -> Session | None:
        """The session all of which the request holds, or which shares messages with it that are half of either.

        First messages do not count: many sessions open alike.
        """
        place = _place(request)
        own = zip(request.messages[1:], request.keys[1:], strict=True)  # many sessions open alike
        weights = {hash((place, key)): len(bytes(raw)) for raw, key in own}
        return self._largest(self._owners, weights, 0)

    def by_letters(self, request: Request, segments: Sequence[Segment]) -> Session | None:
        """The same for prompts of which no byte is as it was."""
        place = _place(request)
        return self._largest(self._letters, {hash((place, k)): s.num_bytes for s, k in _lettered(segments)}, 1)

    def new(self) -> str:
        """A name for a session that is none of those known."""
        self._num_made += 1
        return f"session {self._num_made}"

    def note(self, request: Request, session: Session, prompt: Prompt) -> None:
        """The request is the session's."""
        place = _place(request)
        raws = {hash((place, key)) for key in request.keys[1:]}
        letters = {hash((place, key)) for _, key in _lettered(prompt.segments)}
        before = self._held.get(session.name, (set(), set()))
        self._drop(session.name, before[0] - raws, before[1] - letters)
        for owners, keys in ((self._owners, raws), (self._letters, letters)):
            owners.update(dict.fromkeys(keys, session.name))
        self._held[session.name] = raws, letters

    def forget(self, session: Session) -> None:
        """It is gone."""
        self._drop(session.name, *self._held.pop(session.name, (set(), set())))

    def _drop(self, name: str, raws: Iterable[int], letters: Iterable[int]) -> None:
        for owners, keys in ((self._owners, raws), (self._letters, letters)):
            for key in keys:
                if owners.get(key) == name:
                    del owners[key]

    def _largest(self, owners: dict[int, str], weights: dict[int, int], which: int) -> Session | None:
        votes: Counter[str] = Counter()
        shared: Counter[str] = Counter()
        for key, weight in weights.items():
            name = owners.get(key)
            if name is not None and weight >= _LEAST_BYTES:
                votes[name] += weight
                shared[name] += 1
        if not votes:
            return None
        name, weight = max(votes.items(), key=lambda vote: vote[1])
        held, number = len(self._held[name][which]), shared[name]
        half = 2 * weight >= sum(weights.values()) or 2 * number >= held
        return self._sessions.find(name) if number == held or (number >= 2 and half) else None


def _lettered(segments: Sequence[Segment]) -> list[tuple[Segment, int]]:
    return [(s, s.letters) for s in segments if s.role not in STEM_ROLES and s.letters is not None]


def _place(request: Request) -> tuple[str, str, str]:
    return request.tenant, request.model, request.salt

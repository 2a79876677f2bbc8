"""Whose turn a request without a session id is: the session whose last prompts hold most of what was said.

Not by its prefix, as the engine does it: what an audit looks for is a prefix that broke. A message finds
its session again by its bytes, or by its letters alone where all of a history was spaced or dated anew.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from impala_vllm.insight.audit.compare import Prompt
from impala_vllm.insight.audit.requests import Request, role
from impala_vllm.insight.audit.segment import STEM_ROLES, Segment
from impala_vllm.insight.audit.sessions import Session, Sessions

_LEAST_BYTES = 24
"""A shorter message is said everywhere."""
_TRIED = 8
"""Sessions looked at for one request."""


class Threads:
    """Recognises sessions. Memory: two entries a message of the prompts that `Sessions` keeps."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._bytes = _Owners()
        self._letters = _Owners()
        self._num_made = 0

    def by_bytes(self, request: Request) -> Session | None:
        """The session whose messages the request holds: all of them, or half of the session's or of its own.

        What other sessions began with does not count.
        """
        return self._find(self._bytes, _raw(request))

    def by_letters(self, request: Request, segments: Sequence[Segment]) -> Session | None:
        """The same for prompts of which no byte is as it was."""
        return self._find(self._letters, _lettered(request, segments))

    def new(self) -> str:
        """A name for a session that is none of those known."""
        self._num_made += 1
        return f"session {self._num_made}"

    def note(self, request: Request, session: Session, prompt: Prompt) -> None:
        """The request is the session's."""
        self._bytes.note(session.name, _raw(request))
        self._letters.note(session.name, _lettered(request, prompt.segments))

    def forget(self, session: Session) -> None:
        """It is gone."""
        self._bytes.forget(session.name)
        self._letters.forget(session.name)

    def _find(self, owners: "_Owners", weights: dict[int, int]) -> Session | None:
        name = owners.of(weights)
        return None if name is None else self._sessions.find(name)


@dataclass(slots=True)
class _Said:
    """By one session."""

    stem: frozenset[int]
    """What it began with, but for the last of it that was new: other sessions may begin with that too."""
    end: tuple[int, ...] | None
    """How the prompt ends that it began with, while it has no other one."""
    own: frozenset[int] = frozenset()
    """What else is in its last prompt."""


class _Owners:
    """Which session said what last, by the hash of a message and its tenant."""

    def __init__(self) -> None:
        self._owners: dict[int, str] = {}
        self._stems: Counter[int] = Counter()
        """How many sessions began with a message."""
        self._said: dict[str, _Said] = {}

    def of(self, weights: dict[int, int]) -> str | None:
        """Who said most of these, if that is enough to tell."""
        votes: Counter[str] = Counter()
        for key, weight in weights.items():
            name = self._owners.get(key)
            if name is not None and weight >= _LEAST_BYTES:
                votes[name] += weight
        for name, weight in votes.most_common(_TRIED):
            if self._is_enough(self._said[name], weight, weights):
                return name
        return None

    def _is_enough(self, said: _Said, weight: int, weights: dict[int, int]) -> bool:
        if said.end == _end(weights):
            return False  # nothing was said since: another session that begins alike, or the same again
        number = len(said.own & weights.keys())
        if number == len(said.own):
            return True
        fresh = sum(weight for key, weight in weights.items() if key not in said.stem)
        return number >= 2 and (2 * weight >= fresh or 2 * number >= len(said.own))

    def note(self, name: str, weights: dict[int, int]) -> None:
        """These are what the session says now."""
        said = self._said.get(name)
        if said is None:
            long = [key for key in reversed(weights) if weights[key] >= _LEAST_BYTES]
            new = (key for key in long if key not in self._owners and key not in self._stems)
            last = next(new, long[0] if long else None)
            said = self._said[name] = _Said(frozenset(weights.keys() - {last}), _end(weights))
            self._stems.update(said.stem)
        else:
            said.end = None
        own = frozenset(weights.keys() - said.stem)
        self._drop(name, said.own - own)
        self._owners.update(dict.fromkeys(own, name))
        said.own = own

    def forget(self, name: str) -> None:
        """It is gone."""
        said = self._said.pop(name, None)
        if said is not None:
            self._drop(name, said.own)
            self._stems -= Counter(said.stem)

    def _drop(self, name: str, keys: Iterable[int]) -> None:
        for key in keys:
            if self._owners.get(key) == name:
                del self._owners[key]


def _end(weights: dict[int, int]) -> tuple[int, ...]:
    return tuple(islice(reversed(weights), 2))


def _raw(request: Request) -> dict[int, int]:
    """Sizes of its messages but a system prompt, by what finds them again byte for byte."""
    pairs = zip(request.messages, request.keys, strict=True)
    if request.messages and role(request.messages[0]) in STEM_ROLES:
        next(pairs)
    return {hash((request.tenant, key)): len(bytes(raw)) for raw, key in pairs}


def _lettered(request: Request, segments: Sequence[Segment]) -> dict[int, int]:
    """The same by their letters."""
    return {
        hash((request.tenant, s.letters)): s.num_bytes
        for s in segments
        if s.role not in STEM_ROLES and s.letters is not None
    }

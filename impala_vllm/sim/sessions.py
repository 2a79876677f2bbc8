"""What is asked of the simulated servers: sessions of turns as block keys, and the time between them.

Plain data. `recorded` makes it from logs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from impala_vllm.core.types import Namespace, Outcome


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. `keys` name the full blocks of prompt and output, root first; an equal key is an equal prefix."""

    request_id: str
    keys: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    """At least one."""
    gap_s: float = 0.0
    """Tool time: from the end of the turn before, and of everything joined, to this arrival."""
    joins: tuple[str, ...] = ()
    """Child sessions that must have ended before the gap starts."""
    outcome: Outcome = Outcome.UNKNOWN
    tool: str | None = None
    namespace: Namespace = Namespace()
    output_limit: int | None = None
    """What the client asked for at most; None: the log does not say."""
    next_gap_s: float | None = None
    """Tool time that follows; None: this is the last turn. For bounds that know the future."""

    @property
    def num_tokens(self) -> int:
        """Context after the turn."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Session:
    """A trace. A child starts `start_gap_s` after the end of its parent's turn `after_turn`."""

    session_id: str
    turns: tuple[Turn, ...]
    parent_id: str | None = None
    after_turn: int = -1
    """-1: together with the parent's first turn."""
    start_gap_s: float = 0.0
    arrival_s: float = 0.0
    """Recorded start."""


@dataclass(frozen=True)
class Workload:
    """Sessions, and the block size of their keys."""

    block_size: int
    sessions: tuple[Session, ...]
    has_one_clock: bool = False
    """Recorded starts can be compared: sessions overlap as they did. Else each has a clock of its own."""

    @cached_property
    def children(self) -> dict[str, list[Session]]:
        """By parent."""
        found: dict[str, list[Session]] = {}
        for session in self.sessions:
            if session.parent_id is not None:
                found.setdefault(session.parent_id, []).append(session)
        return found

    def roots(self) -> list[Session]:
        """Sessions that nobody starts: the tasks."""
        return [s for s in self.sessions if s.parent_id is None]

    def turns(self) -> Iterator[Turn]:
        for session in self.sessions:
            yield from session.turns

    def num_turns(self) -> int:
        return sum(len(s.turns) for s in self.sessions)

    def longest_tokens(self) -> int:
        """Context that the longest turn needs."""
        return max((t.num_tokens for t in self.turns()), default=0)

    def family(self, root: Session) -> list[Session]:
        """A task: the session and all below it."""
        found = [root]
        for session in found:
            found += self.children.get(session.session_id, [])
        return found

    def only(self, roots: Iterable[Session]) -> "Workload":
        """The tasks given, in that order."""
        return replace(self, sessions=tuple(s for root in roots for s in self.family(root)))

    def within(self, max_tokens: int) -> "Workload":
        """Each session ends before the turn whose context outgrows `max_tokens`; what that turn launches is gone."""
        kept: dict[str, Session] = {}
        for root in self.roots():
            for session in self.family(root):
                above = kept.get(session.parent_id) if session.parent_id is not None else None
                if session is not root and (above is None or session.after_turn >= len(above.turns)):
                    continue
                fits = next((i for i, t in enumerate(session.turns) if t.num_tokens > max_tokens), len(session.turns))
                if fits:
                    turns = session.turns[:fits]
                    turns = (*turns[:-1], replace(turns[-1], next_gap_s=None)) if fits < len(session.turns) else turns
                    kept[session.session_id] = replace(session, turns=turns)
        return replace(self, sessions=tuple(kept.values()))

    def working_set_tokens(self) -> int:
        """Last prompt + output of every session, shared blocks once."""
        return working_set_tokens(self.sessions, self.block_size)

    def new_tokens(self) -> int:
        """Prompt tokens that an infinite cache still has to compute: blocks nobody had before, and partial tails.

        Sessions take turns one by one, close to the order of any real run. The last token of a prompt is always
        computed, and that of an output never is: the block it ends stays empty.
        """
        seen: set[int] = set()
        new = 0
        for turn in _round_robin(self.sessions):
            reusable = (turn.prompt_tokens - 1) // self.block_size
            hits = next((i for i, key in enumerate(turn.keys[:reusable]) if key not in seen), reusable)
            seen.update(turn.keys[hits : (turn.num_tokens - 1) // self.block_size])
            new += turn.prompt_tokens - hits * self.block_size
        return new


def working_set_tokens(sessions: Iterable[Session], block_size: int) -> int:
    """Last prompt + output of each, shared blocks once."""
    finals = [s.turns[-1] for s in sessions]
    blocks = {key for turn in finals for key in turn.keys}
    return len(blocks) * block_size + sum(turn.num_tokens - len(turn.keys) * block_size for turn in finals)


def _round_robin(sessions: Iterable[Session]) -> Iterator[Turn]:
    left = [list(reversed(s.turns)) for s in sessions]
    while left:
        for turns in left:
            yield turns.pop()
        left = [turns for turns in left if turns]

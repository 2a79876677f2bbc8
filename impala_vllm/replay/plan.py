"""What will be sent: sessions of turns, as token ids, with the time between them.

A plan is plain data. `lowering` makes one from recorded sessions, `synthetic` makes shapes no
recording has, and `load` sends it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlannedTurn:
    """One request: the prompt, the output the engine is made to emit, and the wait before it."""

    request_id: str
    """As recorded; unique in the plan."""
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    gap_s: float
    """Tool time: from the end of the turn before (and of everything joined) to this arrival."""
    joins: tuple[str, ...] = ()
    """Child sessions that must have ended before the gap starts."""


@dataclass(frozen=True, slots=True)
class PlannedSession:
    """A trace. A child starts `start_gap_s` after the end of its parent's turn `after_turn`."""

    session_id: str
    turns: tuple[PlannedTurn, ...]
    parent_id: str | None = None
    after_turn: int = -1
    """-1: together with the parent's first turn."""
    start_gap_s: float = 0.0
    arrival_s: float = 0.0
    """Recorded start on the scaled clock; used by open-loop load only."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Sessions to replay, and what was cut to make them fit."""

    sessions: tuple[PlannedSession, ...]
    num_capped_sessions: int = 0
    """Sessions cut short because a prompt outgrew the context."""
    num_dropped_turns: int = 0

    def turns(self) -> Iterator[tuple[PlannedSession, int, PlannedTurn]]:
        """Every turn with its session and index, session by session."""
        for session in self.sessions:
            for index, turn in enumerate(session.turns):
                yield session, index, turn

    def roots(self) -> list[PlannedSession]:
        """Sessions that nobody starts: the tasks."""
        return [s for s in self.sessions if s.parent_id is None]

    def num_turns(self) -> int:
        return sum(len(s.turns) for s in self.sessions)

    def prompt_tokens(self) -> int:
        return sum(len(t.prompt) for _, _, t in self.turns())

    def working_set_tokens(self) -> int:
        """Last prompt + output of every session, shared openings once."""
        finals = (t.prompt + t.output for s in self.sessions for t in s.turns[-1:])
        return sum(_unshared(sorted(finals)))

    def new_tokens(self, block_size: int) -> int:
        """Prompt tokens an infinite cache still has to compute, at the engine's block size.

        Sessions are taken in turn-by-turn order, which is close to the order of any real run. The
        last token of a prompt is always computed, as in vLLM.
        """
        seen: set[int] = set()
        new = 0
        for turn in _round_robin(self.sessions):
            reusable = (len(turn.prompt) - 1) // block_size
            hits = 0
            for i, key in enumerate(_chain(turn.prompt + turn.output, block_size)):
                if i == hits and i < reusable and key in seen:
                    hits += 1
                seen.add(key)
            new += len(turn.prompt) - hits * block_size
        return new


def _chain(tokens: tuple[int, ...], block_size: int) -> Iterator[int]:
    key = 0
    for start in range(0, len(tokens) - block_size + 1, block_size):
        key = hash((key, tokens[start : start + block_size]))
        yield key


def _round_robin(sessions: Iterable[PlannedSession]) -> Iterator[PlannedTurn]:
    left = [list(reversed(s.turns)) for s in sessions]
    while any(left):
        for turns in left:
            if turns:
                yield turns.pop()


def _unshared(ordered: list[tuple[int, ...]]) -> Iterator[int]:
    """Length of each sequence beyond what it shares with the one before it, in sorted order."""
    before: tuple[int, ...] = ()
    for tokens in ordered:
        shared = next((i for i, (a, b) in enumerate(zip(tokens, before, strict=False)) if a != b), None)
        yield len(tokens) - (min(len(tokens), len(before)) if shared is None else shared)
        before = tokens

"""Routers that know nothing of KV: by turn, by load, by the session's id."""

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from itertools import count

from impala_vllm.sim.routers.peer import Ask, Machines, Peer


class RoundRobin(Peer):
    """In turn."""

    def __init__(self, machines: Machines) -> None:
        self._turn = count()

    def pick(self, ask: Ask, running: Sequence[int], now: float) -> int:
        return next(self._turn) % len(running)


class LeastLoaded(Peer):
    """Fewest requests under way."""

    def __init__(self, machines: Machines) -> None:
        """Needs nothing."""

    def pick(self, ask: Ask, running: Sequence[int], now: float) -> int:
        return min(range(len(running)), key=running.__getitem__)


class ConsistentHash(Peer):
    """By the session's id."""

    def __init__(self, machines: Machines) -> None:
        """Needs nothing."""

    def pick(self, ask: Ask, running: Sequence[int], now: float) -> int:
        return int.from_bytes(blake2b(ask.session.encode(), digest_size=8).digest()) % len(running)


class Sticky(Peer):
    """A session begins where fewest are, and stays there until it ends; a child is a session of its own."""

    def __init__(self, machines: Machines) -> None:
        self._home: dict[str, int] = {}
        self._num_at = Counter[int]()

    def pick(self, ask: Ask, running: Sequence[int], now: float) -> int:
        home = self._home.get(ask.session)
        if home is None:
            home = self._home[ask.session] = min(range(len(running)), key=self._num_at.__getitem__)
            self._num_at[home] += 1
        return home

    def ended(self, ask: Ask, number: int, now: float) -> None:
        if ask.is_last:  # it will not ask for a place again
            self._num_at[number] -= 1
            del self._home[ask.session]

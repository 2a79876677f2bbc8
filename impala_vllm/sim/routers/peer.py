"""What a router is asked and told, whoever decides in it."""

from abc import abstractmethod
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from impala_vllm.core.types import Namespace
from impala_vllm.fleet.places import BlockKey, Replica, Tier
from impala_vllm.sim.timing import Timing


class Ask(NamedTuple):
    """A turn that wants a place."""

    request_id: str
    """Says nothing about whose turn it is."""
    session: str
    """The truth, which only some may read."""
    is_last: bool
    """Its session's; the truth as well."""
    namespace: Namespace
    keys: Sequence[BlockKey]
    """Of the prompt's full blocks."""
    block_tokens: int
    num_tokens: int
    """Of the prompt."""
    num_output: int
    """The truth: published costs have it, or a forecast of it."""


class Machines(NamedTuple):
    """What is routed to."""

    places: Sequence[Replica]
    timing: Timing
    hbm_tokens: int
    """Of each."""
    lot: Random


class Peer:
    """Chooses, and keeps what it has to. Replicas are their numbers."""

    @abstractmethod
    def pick(self, ask: Ask, running: Sequence[int], now: float) -> int:
        """A replica for a turn, which is sent there; `running`: turns that each has been sent and has not ended."""

    def answered(self, ask: Ask, number: int, now: float) -> None:
        """The turn has its first token."""

    def ended(self, ask: Ask, number: int, now: float) -> None:
        """The turn is done."""

    def stored(self, number: int, tier: Tier, keys: Sequence[BlockKey], now: float) -> None:
        """The replica has these blocks: what its events say."""

    def removed(self, number: int, tier: Tier, keys: Sequence[BlockKey]) -> None:
        """It has them no more."""

    def restarted(self, number: int) -> None:
        """It has lost all KV."""

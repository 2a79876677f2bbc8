"""This project's router: `fleet.router.Router` as `impala router` runs it, told nothing but prompts and events."""

import math
from collections.abc import Sequence

from impala_vllm.core.types import Outcome
from impala_vllm.fleet.hashing import Prompt
from impala_vllm.fleet.index import IndexConfig, MaskIndex
from impala_vllm.fleet.places import BlockKey, Tier
from impala_vllm.fleet.residency import Residency
from impala_vllm.fleet.router import Router, Ticket, Turn
from impala_vllm.fleet.scoring import Load, Policy
from impala_vllm.sim.routers.peer import Ask, Machines, Peer

TICK_S = 1.0


class Impala(Peer):
    """The shipped objects in virtual time."""

    def __init__(self, machines: Machines) -> None:
        self._places = machines.places
        self._number_of = {place: number for number, place in enumerate(machines.places)}
        self._index = MaskIndex(IndexConfig(ttl_s=1e9, max_bytes=1 << 40))
        self._loads = {place: Load(machines.hbm_tokens) for place in machines.places}
        self._router = Router(self._loads, Residency(self._index, IndexConfig()), Policy(), machines.lot)
        self._tickets: dict[str, Ticket] = {}
        self._ticked_s = -math.inf

    def pick(self, ask: Ask, running: Sequence[int], now: float) -> int:
        if now - self._ticked_s >= TICK_S:
            self._ticked_s = now
            self._router.tick(now)
        turn = Turn(ask.namespace, Prompt(ask.keys, ask.num_tokens, 0), ask.block_tokens, ask.num_tokens)
        ticket = self._router.start(turn, self._loads, (), now)
        assert ticket is not None, "all replicas are open"
        self._tickets[ask.request_id] = ticket
        return self._number_of[ticket.decision.replica]

    def answered(self, ask: Ask, number: int, now: float) -> None:
        self._router.answer(self._tickets[ask.request_id], now)

    def ended(self, ask: Ask, number: int, now: float) -> None:
        self._router.end(self._tickets.pop(ask.request_id), Outcome.STOP, True, now)

    def stored(self, number: int, tier: Tier, keys: Sequence[BlockKey], now: float) -> None:
        self._index.store(self._places[number], tier, keys, now)

    def removed(self, number: int, tier: Tier, keys: Sequence[BlockKey]) -> None:
        self._index.remove(self._places[number], tier, keys)

    def restarted(self, number: int) -> None:
        self._router.leave(self._places[number])

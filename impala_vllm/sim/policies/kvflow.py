"""KVFlow (https://arxiv.org/abs/2507.07400), re-implemented with oracle gaps: what is executed last goes first.

The paper reads steps to execution from the workflow's graph; here the true time of the next turn stands for them, so
this is a bound. KV of whoever is next is loaded from host in time, and who still loads is passed over. First come,
first served.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from impala_vllm.sim.loop import Loop
from impala_vllm.sim.policies.belady import Belady
from impala_vllm.sim.policies.prefetch import Prefetch
from impala_vllm.sim.request import Request
from impala_vllm.sim.tiers import Room, Tiers

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica

MARGIN_S = 0.05
"""Loads are begun so much earlier than they have to be."""


class KvFlow(Belady):
    """Evicts by the true next turn and loads ahead of it."""

    def __init__(self, replica: "Replica") -> None:
        super().__init__(replica)
        self.prefetch = Prefetch(replica)
        self._loop: Loop | None = None
        self._turns: dict[str, int] = {}

    def tiers(self, loop: Loop, room: Room) -> Tiers:
        self._loop = loop
        return super().tiers(loop, room)

    def finish(self, request: Request, now: float) -> None:
        super().finish(request, now)
        gap_s = request.turn.next_gap_s
        if self._loop is None or gap_s is None:
            return
        name, keys = request.session.session_id, request.keys
        self._turns[name] = request.index
        lead_s = self.prefetch.load_s(len(keys)) + MARGIN_S
        self._loop.at(now + max(0.0, gap_s - lead_s), partial(self._bring, name, request.index, keys))

    def arrive(self, request: Request, now: float) -> None:
        super().arrive(request, now)
        self._turns.pop(request.session.session_id, None)

    def _bring(self, name: str, index: int, keys: Sequence[int]) -> None:
        if self._turns.get(name) == index:
            self.prefetch.bring(keys, name, partial(self._later_blocks, name))

    def _later_blocks(self, name: str) -> int:
        """Idle KV of programs that are executed after this one."""
        mine = self._next_s[name]
        return sum(self.order.num_claimed(other) for other, at in self._next_s.items() if at > mine)

"""The router level: asks a peer where each turn goes, and tells it what replicas do."""

from collections.abc import Callable, Sequence
from functools import partial

from impala_vllm.fleet.places import BlockKey, Tier
from impala_vllm.sim.loop import Loop
from impala_vllm.sim.replica import Replica
from impala_vllm.sim.request import Request
from impala_vllm.sim.routers import Ask, Peer


class Router:
    """In front of replicas that serve nobody else."""

    def __init__(self, loop: Loop, replicas: Sequence[Replica], peer: Peer) -> None:
        self._loop = loop
        self._replicas = replicas
        self._peer = peer
        self._running = [0] * len(replicas)
        for number, replica in enumerate(replicas):
            replica.pool.on_change = partial(self._changed, number, Tier.HBM)
            if replica.tiers is not None:
                replica.tiers.host.on_change = partial(self._changed, number, Tier.HOST)
                replica.tiers.nvme.on_change = partial(self._changed, number, Tier.NVME)

    def send(self, request: Request) -> None:
        """Choose a replica and send the turn there."""
        turn, size = request.turn, self._replicas[0].shape.block_size
        ask = Ask(
            request.request_id,
            request.session.session_id,
            request.index == len(request.session.turns) - 1,
            turn.namespace,
            [BlockKey(key) for key in turn.keys[: turn.prompt_tokens // size]],
            size,
            turn.prompt_tokens,
            turn.output_tokens,
        )
        number = self._peer.pick(ask, self._running, self._loop.now)
        self._running[number] += 1
        request.on_first = partial(self._answered, ask, number)
        request.on_done = partial(self._ended, ask, number, request.on_done)
        self._replicas[number].arrive(request)

    def _answered(self, ask: Ask, number: int) -> None:
        self._peer.answered(ask, number, self._loop.now)

    def _ended(self, ask: Ask, number: int, done: Callable[[Request], None], request: Request) -> None:
        self._running[number] -= 1
        self._peer.ended(ask, number, self._loop.now)
        done(request)

    def _changed(self, number: int, tier: Tier, new: Sequence[int], gone: Sequence[int]) -> None:
        if new:
            self._peer.stored(number, tier, [BlockKey(key) for key in new], self._loop.now)
        if gone:
            self._peer.removed(number, tier, [BlockKey(key) for key in gone])

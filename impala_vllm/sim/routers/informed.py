"""Routers that follow the events of replicas: every block in HBM, without delay."""

from collections.abc import Sequence

from impala_vllm.fleet.index import IndexConfig, MaskIndex
from impala_vllm.fleet.places import BlockKey, Tier
from impala_vllm.sim.routers.peer import Machines, Peer


class Informed(Peer):
    """Keeps the index."""

    def __init__(self, machines: Machines) -> None:
        self._places = machines.places
        self._index = MaskIndex(IndexConfig(ttl_s=1e9, max_bytes=1 << 40))

    def held_blocks(self, keys: Sequence[BlockKey]) -> list[int]:
        """Leading blocks of a prompt that each replica has in HBM."""
        found = self._index.prefixes(keys)
        return [found[place].hbm if place in found else 0 for place in self._places]

    def stored(self, number: int, tier: Tier, keys: Sequence[BlockKey], now: float) -> None:
        self._index.store(self._places[number], tier, keys, now)

    def removed(self, number: int, tier: Tier, keys: Sequence[BlockKey]) -> None:
        self._index.remove(self._places[number], tier, keys)

    def restarted(self, number: int) -> None:
        self._index.clear(self._places[number])

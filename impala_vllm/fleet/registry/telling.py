"""The replicas that this router tells of: it holds their leases, and writes what they hold as its index changes.

A call of `tell` writes so much and no more: what is told from its beginning is spread over many beats, between which
leases are renewed and others are read.
"""

import asyncio
import os
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from impala_vllm.fleet.places import Replica
from impala_vllm.fleet.registry import layout
from impala_vllm.fleet.registry.layout import Client, Place
from impala_vllm.fleet.registry.shared import Held, SharedIndex

BLOCKS_A_BEAT = 50_000
"""Of those told from the beginning: 0.4 s at 7.6 us each, a small part of a lease (docs/scale.md)."""
_BLOCKS_AT_ONCE = 2000
"""Written before others of the event loop get their turn: 15 ms."""


@dataclass(slots=True)
class _Told:
    """A replica that this router tells of."""

    place: Place
    generation: str | None = None
    is_whole: bool = False
    """All of the generation lies there; until then changes wait."""
    number: int = 1


class _Filling(NamedTuple):
    """Replicas that are told from the beginning, and what of them is left to write."""

    generations: Mapping[Replica, str]
    pieces: Iterator[Mapping[Replica, list[Held]]]


class Telling:
    """One router's."""

    def __init__(self, client: Client, router: str, index: SharedIndex) -> None:
        self._client = client
        self._router = router
        self._index = index
        self._told: dict[Replica, _Told] = {}
        self._fillings: deque[_Filling] = deque()

    def __len__(self) -> int:
        return len(self._told)

    def __iter__(self) -> Iterator[Replica]:
        return iter(list(self._told))

    def place(self, replica: Replica) -> Place:
        """Where it is told."""
        return self._told[replica].place

    def stands(self, replica: Replica, head: bytes | None) -> bool:
        """Whether what this router tells of it is what readers find, by that head, or will be."""
        told = self._told.get(replica)
        if told is None:
            return False
        return not told.is_whole or (head is not None and head.decode() == told.generation)

    def begin(self, replica: Replica, place: Place) -> None:
        """The lease is ours: tell all of it, from the beginning."""
        before = self._told.get(replica)
        self._told[replica] = _Told(place, before.generation if before is not None else None)
        self._index.begin_telling(replica)

    def end(self, replica: Replica) -> None:
        """The lease is another's."""
        if self._told.pop(replica, None) is not None:
            self._index.end_telling(replica)

    async def give_up(self, replica: Replica) -> None:
        """Tell no more, and let others."""
        told = self._told.pop(replica)
        self._index.end_telling(replica)
        if await self._client.get(told.place.owner) == self._router.encode():
            await self._client.delete(told.place.owner)

    def forget(self) -> None:
        """Nothing is told any more; leases run out by themselves."""
        for replica in self:
            self.end(replica)
        self._fillings.clear()

    async def renew(self) -> None:
        """What lies there is kept for longer."""
        for told in self._told.values():
            if told.generation is not None:
                await layout.renew(self._client, told.place, told.generation)

    async def tell(self) -> None:
        """What has changed since the last time; where all of it is to be told, the next part of that."""
        renewed = {r for r in self._index.take_renewed() if r in self._told}
        if renewed:
            await self._begin(renewed)
        await self._fill()
        whole = [replica for replica, told in self._told.items() if told.is_whole]
        for replica, blocks in self._index.take_unsaid(whole).items():
            told = self._told.get(replica)
            if told is not None and told.generation is not None:
                told.number = await layout.tell(self._client, told.place, told.generation, told.number, blocks)

    async def _begin(self, renewed: Collection[Replica]) -> None:
        generations: dict[Replica, str] = {}
        for replica in renewed:
            told, before = self._told[replica], self._told[replica].generation
            told.generation, told.number, told.is_whole = os.urandom(6).hex(), 1, False
            generations[replica] = told.generation
            await layout.begin(self._client, told.place, before)
        self._fillings.append(_Filling(generations, self._pieces(renewed)))

    async def _fill(self) -> None:
        num_left = BLOCKS_A_BEAT
        while self._fillings:
            generations, pieces = self._fillings[0]
            for piece in pieces:  # from where the last beat stopped
                await asyncio.sleep(0)
                for replica, blocks in piece.items():
                    told, generation = self._told.get(replica), generations[replica]
                    # Otherwise another tells meanwhile, or it is told anew already.
                    if told is not None and told.generation == generation:
                        await layout.fill(self._client, told.place, generation, blocks)
                    num_left -= len(blocks)
                if num_left <= 0:
                    return
            self._fillings.popleft()
            for replica, generation in generations.items():
                told = self._told.get(replica)
                if told is not None and told.generation == generation:
                    await layout.finish(self._client, told.place, generation)
                    told.is_whole = True

    def _pieces(self, replicas: Collection[Replica]) -> Iterator[Mapping[Replica, list[Held]]]:
        for portion in self._index.everything(set(replicas)):
            yield {}  # to find nothing takes as long
            for replica, blocks in portion.items():
                for start in range(0, len(blocks), _BLOCKS_AT_ONCE):
                    yield {replica: blocks[start : start + _BLOCKS_AT_ONCE]}

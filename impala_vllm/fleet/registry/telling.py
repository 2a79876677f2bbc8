"""The replicas that this router tells of: it holds their leases, and writes what they hold as its index changes."""

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass

from impala_vllm.fleet.places import Replica
from impala_vllm.fleet.registry import layout
from impala_vllm.fleet.registry.layout import Client, Place
from impala_vllm.fleet.registry.shared import SharedIndex


@dataclass(slots=True)
class _Told:
    """A replica that this router tells of."""

    place: Place
    generation: str | None = None
    number: int = 1


class Telling:
    """One router's."""

    def __init__(self, client: Client, router: str, index: SharedIndex) -> None:
        self._client = client
        self._router = router
        self._index = index
        self._told: dict[Replica, _Told] = {}

    def __len__(self) -> int:
        return len(self._told)

    def __iter__(self) -> Iterator[Replica]:
        return iter(list(self._told))

    def __contains__(self, replica: Replica) -> bool:
        return replica in self._told

    def place(self, replica: Replica) -> Place:
        """Where it is told."""
        return self._told[replica].place

    def begin(self, replica: Replica, place: Place) -> None:
        """The lease is ours: tell all of it, from the beginning."""
        self._told[replica] = _Told(place)
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

    async def renew(self) -> None:
        """What lies there is kept for longer."""
        for told in self._told.values():
            if told.generation is not None:
                await layout.renew(self._client, told.place, told.generation)

    async def tell(self) -> None:
        """What has changed since the last time; all of it where that is new."""
        renewed = {r for r in self._index.take_renewed() if r in self._told}
        if renewed:
            for replica in renewed:
                told, before = self._told[replica], self._told[replica].generation
                told.generation, told.number = os.urandom(6).hex(), 1
                await layout.begin(self._client, told.place, told.generation, before)
            for portion in self._index.everything(renewed):
                for replica, blocks in portion.items():
                    if (told := self._told[replica]).generation is not None:
                        await layout.fill(self._client, told.place, told.generation, blocks)
                await asyncio.sleep(0)
            for replica in renewed:
                if (told := self._told[replica]).generation is not None:
                    await layout.finish(self._client, told.place, told.generation)
        for replica, blocks in self._index.take_unsaid().items():
            told = self._told.get(replica)
            if told is not None and told.generation is not None:
                told.number = await layout.tell(self._client, told.place, told.generation, told.number, blocks)

"""The replicas that other routers tell of, and how far each has been read.

A call of `read` takes in so much and no more, and gives way to others of the event loop on the way: leases wait for it.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from impala_vllm.fleet.places import Replica
from impala_vllm.fleet.registry import layout
from impala_vllm.fleet.registry.layout import Client, Cursor, Lost, Place
from impala_vllm.fleet.registry.shared import Held, SharedIndex
from impala_vllm.fleet.registry.source import NOWHERE, Source

BLOCKS_A_BEAT = 50_000
"""Of replicas that are read whole: a second or so (docs/scale.md). The next beat goes on from there."""
BLOCKS_AT_ONCE = 2000
"""Taken over before others of the event loop get their turn."""


@dataclass(slots=True)
class _Reading:
    """A replica that another router tells of."""

    place: Place
    cursor: Cursor | None = None
    """How far its changes were followed, or will be from; None: all is to be read anew."""
    next_part: int = 0
    """Of all that is read since `cursor`; 0: it has been."""
    owner_s: float = 0.0
    """When there was an owner last."""


class Readings:
    """One router's."""

    def __init__(
        self,
        client: Client,
        index: SharedIndex,
        sources: Callable[[], Mapping[Replica, Source]],
        believed_s: float,
    ) -> None:
        """`believed_s`: what was told, after nobody tells it any more."""
        self._client = client
        self._index = index
        self._sources = sources
        self._believed_s = believed_s
        self._reads: dict[Replica, _Reading] = {}

    def note(self, replica: Replica, where: Place, source: Source, is_owned: bool, now_s: float) -> None:
        """A look at its lease: read from now on, no longer, or for as long as what nobody tells is believed."""
        known = self._reads.get(replica)
        if source.is_heard or (known is not None and known.place != where):
            self.stop(replica)
            known = None
        if source.is_heard:
            return
        if known is None:
            if not is_owned:
                return
            known = self._reads[replica] = _Reading(where)
        if is_owned:
            known.owner_s = now_s
        elif now_s - known.owner_s > self._believed_s:
            self.stop(replica)

    def stop(self, replica: Replica) -> None:
        """Nothing that others tell of it is believed."""
        if self._reads.pop(replica, None) is not None:
            self._index.unhear(replica)

    def hand_over(self, replica: Replica) -> None:
        """This router tells of it from now on, beginning with what it has read."""
        self._reads.pop(replica, None)

    def keep(self, replicas: Collection[Replica]) -> None:
        """Stop with all others."""
        for replica in [r for r in self._reads if r not in replicas]:
            self.stop(replica)

    def rewind(self) -> None:
        """Redis was lost: all is read anew."""
        for reading in self._reads.values():
            reading.cursor = None

    async def read(self, now_s: float) -> None:
        """What has changed since the last time, or everything."""
        if not self._reads:
            return
        sources = self._sources()
        for replica in [r for r in self._reads if sources.get(r, NOWHERE).is_heard]:  # since the last claim
            self.stop(replica)
        following = [
            (replica, reading, reading.cursor)
            for replica, reading in self._reads.items()
            if reading.cursor is not None and not reading.next_part and replica in self._index.heard
        ]
        behind = self._reads.keys() - {replica for replica, _, _ in following}
        if following:
            pipe = self._client.pipeline(transaction=False)
            for _, reading, cursor in following:
                pipe.xread({reading.place.changes: cursor.entry}, count=layout.MAX_CHANGES)
            for (replica, reading, cursor), answer in zip(following, await pipe.execute(), strict=True):
                try:
                    reading.cursor, blocks = layout.follow(layout.entries_of(answer), cursor)
                except Lost:
                    reading.cursor = None
                    behind.add(replica)
                else:
                    await self._hear(replica, blocks, now_s)
        num_left = BLOCKS_A_BEAT
        for replica in sorted(behind, key=lambda r: not self._reads[r].next_part):  # what was begun, first
            if num_left <= 0:
                break
            num_left -= await self._read_whole(replica, num_left, now_s)

    async def _read_whole(self, replica: Replica, num_wanted: int, now_s: float) -> int:
        """So much more of it, from where the last beat stopped; how much it was."""
        reading, num_read, is_new = self._reads[replica], 0, False
        if reading.cursor is None or replica not in self._index.heard:
            reading.cursor, reading.next_part, is_new = await layout.look(self._client, reading.place), 0, True
        while reading.cursor is not None and num_read < num_wanted:
            reading.next_part, blocks = await layout.read(
                self._client, reading.place, reading.cursor.generation, reading.next_part
            )
            if self._sources().get(replica, NOWHERE).is_heard:  # meanwhile, and it knows better
                self.stop(replica)
                break
            if is_new:
                self._index.begin_hearing(replica)
                is_new = False
            await self._hear(replica, blocks, now_s)
            num_read += len(blocks)
            if not reading.next_part:
                break
        return num_read

    async def _hear(self, replica: Replica, blocks: Sequence[Held], now_s: float) -> None:
        """In order. A word from its own events ends it on the way: the index takes no more from others then."""
        for start in range(0, len(blocks), BLOCKS_AT_ONCE):
            self._index.hear(replica, blocks[start : start + BLOCKS_AT_ONCE], now_s)
            await asyncio.sleep(0)

"""From a replica's events to what the index has of it."""

import asyncio
from collections.abc import Sequence

from impala_vllm.fleet.events import Event, Removed, Stored
from impala_vllm.fleet.index import Index
from impala_vllm.fleet.places import Replica, Tier


class Into:
    """A replica's events, on their way into the index."""

    def __init__(self, index: Index, replica: Replica, group: int) -> None:
        self._index = index
        self._replica = replica
        self._group = group

    def apply(self, events: Sequence[Event]) -> None:
        """Take over changes of the group that stands for prefixes."""
        now = asyncio.get_running_loop().time()
        for event in events:
            if isinstance(event, Stored):
                if event.group == self._group:
                    self._index.store(self._replica, event.tier, event.keys, now)
            elif isinstance(event, Removed):
                if event.group == self._group:
                    self._index.remove(self._replica, event.tier, event.keys)
            else:  # other tiers tell of what they drop
                self._index.clear(self._replica, Tier.HBM)

    def lost(self) -> None:
        """Forget what the index has of it. Its traces stay: their KV most likely is still there."""
        self._index.clear(self._replica)

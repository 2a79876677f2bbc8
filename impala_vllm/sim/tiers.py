"""Host and NVMe below HBM, as vLLM's own offloading fills them: every block is written through, LRU everywhere.

A link carries one transfer after the other in each direction. What waits for a load holds its blocks and no seat;
what waits for NVMe is passed over until host has it. Nothing here knows about sessions.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from impala_vllm.sim.loop import Loop
from impala_vllm.sim.request import Request


@dataclass(frozen=True, slots=True)
class Room:
    """What lies below the HBM of one replica. Rates None: infinitely fast."""

    host_blocks: int
    nvme_blocks: int
    block_bytes: int
    host_bytes_per_s: float | None
    nvme_read_bytes_per_s: float | None
    nvme_write_bytes_per_s: float | None


class Line:
    """One direction of a link."""

    def __init__(self, loop: Loop, bytes_per_s: float | None) -> None:
        self.num_bytes = 0
        """Carried or asked for so far."""
        self._loop = loop
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0

    def wait_s(self) -> float:
        """Until what was asked for has arrived."""
        return max(0.0, self._free_s - self._loop.now)

    def send(self, num_bytes: int, done: Callable[[float], None]) -> None:
        """`done` is told how long the transfer took, without its wait."""
        took_s = num_bytes / self._bytes_per_s if self._bytes_per_s else 0.0
        self._free_s = max(self._free_s, self._loop.now) + took_s
        self.num_bytes += num_bytes
        self._loop.at(self._free_s, partial(done, took_s))


class Store:
    """Blocks of one tier by key, the least recently used first. Pinned ones and those under way stay."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ready: OrderedDict[int, None] = OrderedDict()
        self._filling: set[int] = set()
        self._pins: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._ready) + len(self._filling)

    @property
    def num_free(self) -> int:
        return self.num_blocks - len(self)

    def may_go(self, key: int) -> bool:
        """Ready, and nobody reads it."""
        return key in self._ready and key not in self._pins

    def __contains__(self, key: object) -> bool:
        return key in self._ready or key in self._filling

    def is_ready(self, key: int) -> bool:
        return key in self._ready

    def touch(self, keys: Sequence[int]) -> None:
        """Those that are ready were used, the root last: a chain loses its tail first."""
        for key in reversed(keys):
            if key in self._ready:
                self._ready.move_to_end(key)

    def reserve(self, keys: Sequence[int]) -> list[int]:
        """Make room for blocks that are not here; the leading ones for which there is."""
        self.evict(self._victims(len(keys) - self.num_free))
        fitting = list(keys[: self.num_free])
        self._filling.update(fitting)
        return fitting

    def evict(self, keys: Iterable[int]) -> None:
        """Forget blocks that may go."""
        for key in keys:
            del self._ready[key]

    def reserve_all(self, keys: Sequence[int]) -> bool:
        """The same for all of them; false: there is no room, nothing changed."""
        lacking = len(keys) - self.num_free
        if len(self._victims(lacking)) < lacking:
            return False
        return bool(self.reserve(keys))

    def commit(self, keys: Sequence[int]) -> None:
        """The bytes of reserved blocks are there."""
        for key in reversed(keys):
            self._filling.discard(key)
            self._ready[key] = None

    def pin(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._pins[key] = self._pins.get(key, 0) + 1

    def unpin(self, keys: Sequence[int]) -> None:
        for key in keys:
            left = self._pins.pop(key) - 1
            if left:
                self._pins[key] = left

    def check_invariants(self) -> None:
        """Raise AssertionError where there is too much. O(n), for tests."""
        assert len(self) <= self.num_blocks
        assert not self._filling.intersection(self._ready)

    def _victims(self, count: int) -> list[int]:
        """Up to `count` blocks that may go, those that go first."""
        return list(islice((key for key in self._ready if key not in self._pins), max(0, count)))


class Tiers:
    """Plain caches. A replica tells of what it computes and asks what need not be computed."""

    def __init__(self, loop: Loop, room: Room) -> None:
        self.room = room
        self.host = Store(room.host_blocks)
        self.nvme = Store(room.nvme_blocks)
        self.loads, self.stores = Line(loop, room.host_bytes_per_s), Line(loop, room.host_bytes_per_s)
        self.reads, self.writes = Line(loop, room.nvme_read_bytes_per_s), Line(loop, room.nvme_write_bytes_per_s)
        self.on_arrival: Callable[[], None] = _nothing
        """Told when blocks have come into host: somebody may wait for them."""
        self._awaited: dict[Request, list[int]] = {}
        """Pinned in host for requests that wait for more from NVMe."""

    @property
    def bytes_moved(self) -> int:
        return sum(line.num_bytes for line in (self.loads, self.stores, self.reads, self.writes))

    def reach(self, request: Request, num_hits: int, limit: int) -> int | None:
        """How many blocks behind its `num_hits` to load, at most up to block `limit`.

        None: wait, some are on their way into host.
        """
        keys, pinned = request.keys, self._awaited.pop(request, ())
        behind = num_hits
        while behind < limit and self.host.is_ready(keys[behind]):
            behind += 1
        self.host.touch(keys[:behind])
        end = behind
        while end < limit and (keys[end] in self.host or self.nvme.is_ready(keys[end])):
            end += 1
        missing = [k for k in keys[behind:end] if k not in self.host]
        waits = end > behind and (not missing or self.promote(missing))
        if waits:
            # What has come stays until all is there: else those who wait evict each other's blocks for ever.
            self._awaited[request] = awaited = list(keys[num_hits:end])
            self.host.pin(awaited)
        self.host.unpin(pinned)
        return None if waits else behind - num_hits

    def promote(self, keys: Sequence[int]) -> bool:
        """Read blocks from NVMe into host; false where host has no room for all of them."""
        if not self.host.reserve_all(keys):
            return False
        self.nvme.pin(keys)
        self.nvme.touch(keys)
        self.reads.send(len(keys) * self.room.block_bytes, partial(self._read, keys))
        return True

    def load(self, request: Request, keys: Sequence[int], done: Callable[[], None]) -> None:
        """Bring ready host blocks into HBM."""
        self.host.pin(keys)
        self.loads.send(len(keys) * self.room.block_bytes, partial(self._loaded, keys, done))

    def computed(self, request: Request, keys: Sequence[int]) -> None:
        """Blocks of the request that HBM has: write through what host lacks."""
        fresh = [k for k in dict.fromkeys(keys) if k not in self.host]
        fitting = self.host.reserve(fresh) if fresh else []
        if fitting:
            self.stores.send(len(fitting) * self.room.block_bytes, partial(self._stored, request, fitting))

    def finished(self, request: Request) -> None:
        """The request is done; its blocks count as used now."""
        self.host.touch(request.keys)

    def _stored(self, request: Request, keys: Sequence[int], took_s: float) -> None:
        self.host.commit(keys)
        if self._awaited:
            self.on_arrival()
        self.write(keys)

    def write(self, keys: Sequence[int]) -> None:
        """Copy ready host blocks to NVMe."""
        fresh = [k for k in keys if k not in self.nvme]
        fitting = self.nvme.reserve(fresh) if fresh and self.room.nvme_blocks else []
        if fitting:
            self.host.pin(fitting)
            self.writes.send(len(fitting) * self.room.block_bytes, partial(self._written, fitting))

    def _written(self, keys: Sequence[int], took_s: float) -> None:
        self.host.unpin(keys)
        self.nvme.commit(keys)

    def _read(self, keys: Sequence[int], took_s: float) -> None:
        self.nvme.unpin(keys)
        self.host.commit(keys)
        self.on_arrival()

    def _loaded(self, keys: Sequence[int], done: Callable[[], None], took_s: float) -> None:
        self.host.unpin(keys)
        done()


def _nothing() -> None:
    """Nobody waits."""

"""Host and NVMe below HBM, as vLLM's own offloading connector and tiering manager fill and read them.

Blocks get a place in host when the step that computes them is scheduled, all of a request's or none, and are sent when
it is over; use counts once a turn, when it ends; NVMe is read block by block into host, in whose place nobody looks.
What has arrived is noticed between steps. Nothing here knows about sessions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from impala_vllm.sim.loop import Loop
from impala_vllm.sim.request import Request
from impala_vllm.sim.store import LruStore, Store

MAX_PASSES = 64
"""Two requests, or one that is larger than host, can read NVMe into each other's place for ever. vLLM lets them; here
a request computes what it has not got after so many attempts, which is kinder to what is compared with."""


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
    """One direction of a link: one transfer after the other."""

    def __init__(self, loop: Loop, bytes_per_s: float | None) -> None:
        self.num_bytes = 0
        """Carried or asked for so far."""
        self._loop = loop
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0

    def wait_s(self) -> float:
        """Until what was asked for has arrived."""
        return max(0.0, self._free_s - self._loop.now)

    def due_s(self, num_bytes: int) -> float:
        """Until so many more would have arrived, were they asked for now."""
        return self.wait_s() + self._takes_s(num_bytes)

    def send(self, num_bytes: int, done: Callable[[float], None]) -> None:
        """`done` is told how long the transfer took, without its wait."""
        took_s = self._takes_s(num_bytes)
        self._free_s = max(self._free_s, self._loop.now) + took_s
        self.num_bytes += num_bytes
        self._loop.at(self._free_s, partial(done, took_s))

    def _takes_s(self, num_bytes: int) -> float:
        return num_bytes / self._bytes_per_s if self._bytes_per_s else 0.0


@dataclass(slots=True)
class Offered:
    """What the tiers know of an unfinished request."""

    num_blocks: int = 0
    """Leading blocks that host has been offered, or that came from there."""
    num_storing: int = 0
    """Stores under way."""
    num_passes: int = 0
    """Attempts to read NVMe for it."""
    used: set[int] = field(default_factory=set[int])
    """Blocks of it that were loaded, stored, or offered while host had them."""


class Tiers:
    """Plain caches. A replica tells of what it computes and asks what need not be computed."""

    make_store: type[Store] = LruStore

    def __init__(self, loop: Loop, room: Room) -> None:
        self.room = room
        self.host = self.make_store(room.host_blocks)
        self.nvme = self.make_store(room.nvme_blocks)
        self.loads, self.stores = Line(loop, room.host_bytes_per_s), Line(loop, room.host_bytes_per_s)
        self.reads, self.writes = Line(loop, room.nvme_read_bytes_per_s), Line(loop, room.nvme_write_bytes_per_s)
        self.on_arrival: Callable[[], None] = _nothing
        """Told when a transfer has ended: `poll` says what that means."""
        self._arrived: list[Callable[[], None]] = []
        self._offered: dict[Request, Offered] = {}
        self._finished: list[tuple[Request, int]] = []
        self._unsent: list[Callable[[], None]] = []
        self._loading: set[int] = set()

    @property
    def bytes_moved(self) -> int:
        return sum(line.num_bytes for line in (self.loads, self.stores, self.reads, self.writes))

    def poll(self) -> None:
        """Between two steps: notice what has arrived."""
        arrived, self._arrived = self._arrived, []
        for notice in arrived:
            notice()

    def between_steps(self, call: Callable[[], None]) -> None:
        """Have `call` made as if a transfer had ended now: it may take blocks, which nobody may while a step runs."""
        self._arrived.append(call)
        self.on_arrival()

    def reach(self, request: Request, num_hits: int, limit: int) -> int | None:
        """How many blocks behind its `num_hits` to load, at most up to block `limit`.

        None: wait, some are on their way, or stores of the request are.
        """
        offered = self._of(request)
        if offered.num_storing:
            return None
        end = self.ready_end(request, num_hits, limit)
        if end is None or not self._loading.isdisjoint(request.keys[num_hits:end]):
            return None
        return end - num_hits

    def ready_end(self, request: Request, start: int, limit: int) -> int | None:
        """Where the leading ready host blocks behind `start` end. None: at a later time more are ready."""
        host, nvme, offered = self.host, self.nvme, self._of(request)
        assert isinstance(host, LruStore)
        assert isinstance(nvme, LruStore)
        may_read = offered.num_passes < MAX_PASSES
        reading: list[int] = []
        end, waits = start, False
        for key in request.keys[start:limit]:
            if not host.is_ready(key):
                if key not in host:
                    # One by one, and the next victim may be a block of this very request: vLLM does not mind.
                    if not (may_read and nvme.is_ready(key) and host.make_room(1)):
                        break
                    host.reserve([key])
                    reading.append(key)
                waits = True
            end += 1
        if reading:
            offered.num_passes += 1
            offered.used.update(reading)
            nvme.touch(reading)
            self._read(reading, _nothing)
        return None if waits else end

    def load(self, request: Request, start: int, keys: Sequence[int], done: Callable[[], None]) -> None:
        """Bring ready host blocks, the request's from `start` on, into HBM."""
        offered = self._of(request)
        offered.num_blocks = start + len(keys)  # what HBM had before them is offered no more
        offered.used.update(keys)
        self.bring(keys, done)

    def bring(self, keys: Sequence[int], done: Callable[[], None]) -> None:
        """The same for nobody who waits yet."""
        self.host.pin(keys)
        self._loading.update(keys)

        def loaded(took_s: float) -> None:
            self.host.unpin(keys)
            self._loading.difference_update(keys)
            self.has_loaded(keys, took_s)
            done()

        self.send(self.loads, len(keys), loaded)

    def num_ready(self, keys: Sequence[int]) -> int:
        """How many leading blocks host could load now."""
        return next((i for i, k in enumerate(keys) if not self.host.is_ready(k)), len(keys))

    def has_loaded(self, keys: Sequence[int], took_s: float) -> None:
        """A load is over."""

    def scheduled(self, request: Request, num_blocks: int) -> None:
        """After this step the request's first `num_blocks` blocks are full."""
        offered = self._of(request)
        keys = request.keys[offered.num_blocks : num_blocks]
        if keys and self.offer(request, keys, offered):
            offered.num_blocks = num_blocks

    def offer(self, request: Request, keys: Sequence[int], offered: Offered) -> bool:
        """Find room in host for blocks that are being computed. False: they are offered again with the next ones."""
        host = self.host
        assert isinstance(host, LruStore)
        fresh = [k for k in keys if k not in host]
        offered.used.update(fresh)
        offered.used.update(k for k in keys if host.is_ready(k))
        if not fresh:
            return True
        if not host.make_room(len(fresh), set(keys)):
            return False
        self.store(request, fresh, partial(self._stored, fresh))
        return True

    def store(self, request: Request, keys: Sequence[int], done: Callable[[], None]) -> None:
        """Reserve host blocks now and have them filled when the step is over."""
        self.host.reserve(keys)
        offered = self._of(request)
        offered.num_storing += 1

        def stored(_: float) -> None:
            offered.num_storing -= 1
            self.host.commit(keys)
            done()

        self._unsent.append(partial(self.send, self.stores, len(keys), stored))

    def stepped(self) -> None:
        """The step is over: what it computed can be sent."""
        unsent, self._unsent = self._unsent, []
        for begin in unsent:
            begin()

    def finished(self, request: Request, num_blocks: int) -> None:
        """The request is done with so many full blocks."""
        self._finished.append((request, num_blocks))

    def planned(self) -> None:
        """All of a step is scheduled. What ended before it counts as used only now, after what the step stores."""
        finished, self._finished = self._finished, []
        for request, num_blocks in finished:
            self.scheduled(request, num_blocks)
            self.used([k for k in request.keys if k in self._offered[request].used])
            del self._offered[request]

    def used(self, keys: Sequence[int]) -> None:
        """A turn that used these blocks has ended."""
        assert isinstance(self.host, LruStore)
        self.host.touch(keys)

    def write(self, keys: Sequence[int], done: Callable[[], None]) -> None:
        """Copy ready host blocks to NVMe, which must have room."""
        self.nvme.reserve(keys)
        self.host.pin(keys)

        def written(_: float) -> None:
            self.host.unpin(keys)
            self.nvme.commit(keys)
            done()

        self.send(self.writes, len(keys), written)

    def read(self, keys: Sequence[int], done: Callable[[float], None]) -> None:
        """Copy ready NVMe blocks to host, which must have room."""
        self.host.reserve(keys)
        self._read(keys, done)

    def send(self, line: Line, num_blocks: int, done: Callable[[float], None]) -> None:
        """`done` is called when it is noticed that the blocks have arrived."""

        line.send(num_blocks * self.room.block_bytes, lambda took_s: self.between_steps(partial(done, took_s)))

    def _read(self, keys: Sequence[int], done: Callable[[float], None]) -> None:
        self.nvme.pin(keys)

        def read(took_s: float) -> None:
            self.nvme.unpin(keys)
            self.host.commit(keys)
            done(took_s)

        self.send(self.reads, len(keys), read)

    def _stored(self, keys: Sequence[int]) -> None:
        """Write through."""
        nvme = self.nvme
        assert isinstance(nvme, LruStore)
        fresh = [k for k in keys if k not in nvme]
        if fresh and self.room.nvme_blocks and nvme.make_room(len(fresh)):
            self.write(fresh, _nothing)

    def _of(self, request: Request) -> Offered:
        found = self._offered.get(request)
        if found is None:
            found = self._offered[request] = Offered()
        return found


def _nothing(_: float = 0.0) -> None:
    """Nobody waits."""

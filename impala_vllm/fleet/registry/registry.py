"""One router's side of Redis: tells what it hears, reads of whom it cannot hear, says how busy it keeps each replica.

One asyncio task, started and ended by `run`; nothing that decides waits for it. For each replica one router holds a
lease and tells. While Redis is gone the router goes on with what it hears itself; once it is back everything is told
and read anew, so that no half-told state survives a restart of either side.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from impala_vllm.fleet.places import Replica, ServerId
from impala_vllm.fleet.registry import layout
from impala_vllm.fleet.registry.layout import Cursor, Lost, Place
from impala_vllm.fleet.registry.shared import SharedIndex
from impala_vllm.fleet.scoring import Elsewhere, Load

logger = logging.getLogger("impala.fleet")

LOADS = "impala:1:loads"
"""Hash: router -> how busy it keeps each replica. The number in it changes with each beat; one that does not is old."""
_SCHEMES = ("redis", "rediss", "unix")


class RegistryError(ValueError):
    """Not a registry; one line."""


@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """Periods of the exchange."""

    every_s: float = 0.1
    """Between two looks at changes, and two words on how busy servers are."""
    claim_s: float = 1.0
    """Between two looks at who tells of which replica."""
    lease_s: float = 5.0
    """A router that is silent for so long no longer tells."""
    within_s: float = 1.25
    """For Redis to answer. With `again_s` the longest that routers go on alone after the network is back: under 2 s."""
    believed_s: float = 10.0
    """What others told, after they or Redis fell silent."""
    again_s: float = 0.25
    """Between two attempts to reach Redis."""


class Source(NamedTuple):
    """What the fleet knows of a replica whose hashes are believed."""

    namespace: str
    epoch: str
    is_heard: bool
    """Its own events reach this router."""


class Beat(msgspec.Struct, array_like=True):
    """How busy a router keeps its replicas."""

    number: int
    loads: list[tuple[str, int, int, float, int, int]]
    """Server, rank, running, pending seconds, live tokens, live traces."""


@dataclass(slots=True)
class _Told:
    """A replica that this router tells of."""

    place: Place
    generation: str | None = None
    number: int = 1


@dataclass(slots=True)
class _Read:
    """A replica that another router tells of."""

    place: Place
    cursor: Cursor | None = None
    owner_s: float = 0.0
    """When there was an owner last."""


class Registry:
    """Created, then `run` as a task; cancelling it gives the leases back."""

    def __init__(
        self,
        url: str,
        index: SharedIndex,
        sources: Callable[[], Mapping[Replica, Source]],
        loads: Mapping[Replica, Load],
        config: RegistryConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises RegistryError for what is not a URL of Redis, or where the package is missing. Connects later."""
        self._client = _client(url, config or RegistryConfig())
        self._config = config or RegistryConfig()
        self.where = urlsplit(url).hostname or urlsplit(url).path
        """For people; without the password."""
        self.index = index
        self.problem: str | None = "not reached yet"
        """Why nothing is shared; None: it is."""
        self.num_failures = 0
        """Times that Redis was lost or not reached."""
        self._clock = clock
        self._sources = sources
        self._loads = loads
        self._id = os.urandom(8).hex()
        self._told: dict[Replica, _Told] = {}
        self._reads: dict[Replica, _Read] = {}
        self._beats: dict[str, tuple[int, float]] = {}
        """Of other routers: number, and when it was new."""
        self._num_beats = 0
        self._run_id: str | None = None
        self._claimed_s = self._renewed_s = float("-inf")
        self._reached_s = float("-inf")

    @property
    def num_told(self) -> int:
        """Replicas that this router tells of."""
        return len(self._told)

    async def run(self) -> None:
        """Never returns; cancel it."""
        try:
            while True:
                shares = await self.beat()
                await asyncio.sleep(self._config.every_s if shares else self._config.again_s)
        finally:
            await self.leave()

    async def beat(self) -> bool:
        """One exchange; False: Redis is not there. Never raises for what it does or holds."""
        try:
            await self._exchange(self._clock())
        except Exception as e:  # redis raises much, and what others wrote is no reason to stop routing
            self._lose(e)
            return False
        return True

    async def leave(self) -> None:
        """Give the leases back, so that others need not wait for their end. Last call."""
        try:
            async with asyncio.timeout(self._config.within_s):
                for replica in list(self._told):
                    await self._give_up(replica)
                await self._client.hdel(LOADS, self._id)
        except Exception as e:  # they run out by themselves
            logger.debug("leases were left (%s)", type(e).__name__)
        await self._client.aclose()

    async def _exchange(self, now_s: float) -> None:
        if now_s - self._claimed_s >= self._config.claim_s:
            await self._claim(now_s)
            self._claimed_s = now_s
        await self._tell()
        await self._read(now_s)
        await self._exchange_loads(now_s)
        self._reached_s = now_s
        if self.problem is not None:
            logger.info("registry at %s: shared", self.where)
            self.problem = None

    async def _claim(self, now_s: float) -> None:
        """Leases: taken where this router hears a replica and nobody tells, given back where it no longer hears."""
        sources = dict(self._sources())
        places = {r: layout.place(s.namespace, r, s.epoch) for r, s in sources.items()}
        for replica, told in list(self._told.items()):
            if not sources.get(replica, _NOWHERE).is_heard or told.place != places[replica]:
                await self._give_up(replica)
        pipe = self._client.pipeline(transaction=False)
        pipe.info("server")
        lease_ms = int(self._config.lease_s * 1000)
        for replica, source in sources.items():
            if source.is_heard:
                pipe.set(places[replica].owner, self._id, nx=True, get=True, px=lease_ms)
            else:
                pipe.get(places[replica].owner)
        info, *owners = await pipe.execute()
        if self._run_id not in (None, info["run_id"]):
            self._run_id = None
            raise Lost("Redis is another one than before")
        self._run_id = info["run_id"]
        mine = self._id.encode()
        renewals = self._client.pipeline(transaction=False)
        for (replica, source), owner in zip(sources.items(), owners, strict=True):
            where = places[replica]
            if source.is_heard and owner in (None, mine):
                if owner is None or replica not in self._told:  # a lease that ran out may have been another's meanwhile
                    self._told[replica] = _Told(where)
                    self._reads.pop(replica, None)
                    self.index.begin_telling(replica)
                renewals.pexpire(where.owner, lease_ms)
                continue
            if replica in self._told:
                self.index.end_telling(replica)
                del self._told[replica]
            self._note_reading(replica, where, source, owner is not None, now_s)
        for replica in self._reads.keys() - sources.keys():
            self._stop_reading(replica)
        await renewals.execute()
        if now_s - self._renewed_s >= layout.KEPT_MS / 4000:
            self._renewed_s = now_s
            for told in self._told.values():
                if told.generation is not None:
                    await layout.renew(self._client, told.place, told.generation)

    def _note_reading(self, replica: Replica, where: Place, source: Source, is_owned: bool, now_s: float) -> None:
        known = self._reads.get(replica)
        if source.is_heard or (known is not None and known.place != where):
            self._stop_reading(replica)
            known = None
        if source.is_heard:
            return
        if known is None:
            if not is_owned:
                return
            known = self._reads[replica] = _Read(where)
        if is_owned:
            known.owner_s = now_s
        elif now_s - known.owner_s > self._config.believed_s:
            self._stop_reading(replica)

    def _stop_reading(self, replica: Replica) -> None:
        if self._reads.pop(replica, None) is not None:
            self.index.unhear(replica)

    async def _tell(self) -> None:
        renewed = {r for r in self.index.take_renewed() if r in self._told}
        if renewed:
            for replica in renewed:
                told, before = self._told[replica], self._told[replica].generation
                told.generation, told.number = os.urandom(6).hex(), 1
                await layout.begin(self._client, told.place, told.generation, before)
            for portion in self.index.everything(renewed):
                for replica, blocks in portion.items():
                    if (told := self._told[replica]).generation is not None:
                        await layout.fill(self._client, told.place, told.generation, blocks)
                await asyncio.sleep(0)
            for replica in renewed:
                if (told := self._told[replica]).generation is not None:
                    await layout.finish(self._client, told.place, told.generation)
        for replica, blocks in self.index.take_unsaid().items():
            told = self._told.get(replica)
            if told is not None and told.generation is not None:
                told.number = await layout.tell(self._client, told.place, told.generation, told.number, blocks)

    async def _read(self, now_s: float) -> None:
        if not self._reads:
            return
        sources = self._sources()
        for replica in [r for r in self._reads if sources.get(r, _NOWHERE).is_heard]:  # since the last claim
            self._stop_reading(replica)
        following = [
            (replica, reading, reading.cursor)
            for replica, reading in self._reads.items()
            if reading.cursor is not None and replica in self.index.heard
        ]
        behind = self._reads.keys() - {replica for replica, _, _ in following}
        if following:
            pipe = self._client.pipeline(transaction=False)
            for _, reading, cursor in following:
                pipe.xread({reading.place.changes: cursor.entry}, count=layout.MAX_CHANGES)
            for (replica, reading, cursor), answer in zip(following, await pipe.execute(), strict=True):
                try:
                    reading.cursor, blocks = layout.follow(layout.entries_of(answer), cursor)
                    self.index.hear(replica, blocks, now_s)
                except Lost:
                    behind.add(replica)
        for replica in behind:
            reading = self._reads[replica]
            found = await layout.read(self._client, reading.place)
            if self._sources().get(replica, _NOWHERE).is_heard:  # meanwhile, and it knows better
                self._stop_reading(replica)
            elif found is not None:
                reading.cursor = found[0]
                self.index.hear_all(replica, found[1], now_s)

    async def _exchange_loads(self, now_s: float) -> None:
        self._num_beats += 1
        rows: list[tuple[str, int, int, float, int, int]] = [
            (r.server, r.dp_rank, load.num_running, round(load.pending_s, 4), load.live_tokens, load.num_traces)
            for r, load in self._loads.items()
            if load.num_running or load.live_tokens
        ]
        pipe = self._client.pipeline(transaction=False)
        pipe.hset(LOADS, self._id, msgspec.msgpack.encode(Beat(self._num_beats, rows)))
        pipe.pexpire(LOADS, layout.KEPT_MS)
        pipe.hgetall(LOADS)
        *_, told = await pipe.execute()
        sums: dict[Replica, Elsewhere] = {}
        for router, packed in told.items():
            beat = self._beat(router.decode(), packed, now_s)
            for server, rank, running, pending_s, tokens, traces in beat.loads if beat is not None else ():
                replica = Replica(ServerId(server), rank)
                before = sums.get(replica, Elsewhere())
                sums[replica] = Elsewhere(
                    before.num_running + running,
                    before.pending_s + pending_s,
                    before.live_tokens + tokens,
                    before.num_traces + traces,
                )
        for replica, load in self._loads.items():
            load.elsewhere = sums.get(replica, Elsewhere())
        for router in [r for r, (_, new_s) in self._beats.items() if now_s - new_s > 6 * self._config.believed_s]:
            del self._beats[router]
            await self._client.hdel(LOADS, router)

    def _beat(self, router: str, packed: bytes, now_s: float) -> Beat | None:
        """Another router's; None: it is our own, nobody's, or old."""
        if router == self._id:
            return None
        try:
            beat = msgspec.msgpack.decode(packed, type=Beat)
        except msgspec.DecodeError:
            return None
        number, new_s = self._beats.get(router, (None, now_s))
        if number != beat.number:
            new_s = now_s
        self._beats[router] = beat.number, new_s
        return beat if now_s - new_s <= self._config.lease_s else None

    async def _give_up(self, replica: Replica) -> None:
        told = self._told.pop(replica)
        self.index.end_telling(replica)
        if await self._client.get(told.place.owner) == self._id.encode():
            await self._client.delete(told.place.owner)

    def _lose(self, error: Exception) -> None:
        """On our own from here: nothing is remembered for others, and soon nothing believed of them."""
        self.num_failures += 1
        if self.problem is None:
            logger.warning("registry at %s is gone (%s); on what this router hears itself", self.where, _said(error))
        self.problem = _said(error)
        for replica in self._told:
            self.index.end_telling(replica)
        self._told.clear()
        self._claimed_s = float("-inf")
        for reading in self._reads.values():
            reading.cursor = None
        for load in self._loads.values():
            load.elsewhere = Elsewhere()
        if self._clock() - self._reached_s > self._config.believed_s:
            for replica in list(self._reads):
                self._stop_reading(replica)


_NOWHERE = Source("", "", False)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _client(url: str, config: RegistryConfig) -> Any:
    if urlsplit(url).scheme not in _SCHEMES:
        raise RegistryError(f"{url}: unknown registry; write memory, or redis://HOST:PORT/DB")
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as e:
        raise RegistryError("a shared registry needs redis; `pip install 'impala-vllm[redis]'`") from e
    library: Any = Redis
    try:
        return library.from_url(
            url,
            protocol=2,
            socket_timeout=config.within_s,
            socket_connect_timeout=config.within_s,
            retry=Retry(NoBackoff(), 0),  # a failure is acted upon, not hidden
        )
    except ValueError as e:
        raise RegistryError(f"{url.partition('@')[2] or url}: {e}") from e

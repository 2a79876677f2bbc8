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
from urllib.parse import urlsplit

from impala_vllm.fleet.places import Replica
from impala_vllm.fleet.registry import client, layout
from impala_vllm.fleet.registry.busy import Busy
from impala_vllm.fleet.registry.client import RegistryConfig
from impala_vllm.fleet.registry.layout import Lost
from impala_vllm.fleet.registry.readings import Readings
from impala_vllm.fleet.registry.shared import SharedIndex
from impala_vllm.fleet.registry.source import NOWHERE, Source
from impala_vllm.fleet.registry.telling import Telling
from impala_vllm.fleet.scoring import Load

logger = logging.getLogger("impala.fleet")


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
        self._config = config or RegistryConfig()
        self._client = client.connect(url, self._config)
        self.where = urlsplit(url).hostname or urlsplit(url).path
        """For people; without the password."""
        self.index = index
        self.problem: str | None = "not reached yet"
        """Why nothing is shared; None: it is."""
        self.num_failures = 0
        """Times that Redis was lost or not reached."""
        self._clock = clock
        self._sources = sources
        self._id = os.urandom(8).hex()
        self._telling = Telling(self._client, self._id, index)
        self._readings = Readings(self._client, index, sources, self._config.believed_s)
        self._busy = Busy(self._client, self._id, loads, self._config)
        self._run_id: str | None = None
        self._claimed_s = self._renewed_s = float("-inf")
        self._reached_s = float("-inf")

    @property
    def num_told(self) -> int:
        """Replicas that this router tells of."""
        return len(self._telling)

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
                for replica in self._telling:
                    await self._telling.give_up(replica)
                await self._busy.leave()
        except Exception as e:  # they run out by themselves
            logger.debug("leases were left (%s)", type(e).__name__)
        await self._client.aclose()

    async def _exchange(self, now_s: float) -> None:
        if now_s - self._claimed_s >= self._config.claim_s:
            await self._claim(now_s)
            self._claimed_s = now_s
        await self._telling.tell()
        await self._readings.read(now_s)
        await self._busy.exchange(now_s)
        self._reached_s = now_s
        if self.problem is not None:
            logger.info("registry at %s: shared", self.where)
            self.problem = None

    async def _claim(self, now_s: float) -> None:
        """Leases: taken where this router hears a replica and nobody tells, given back where it no longer hears."""
        sources = dict(self._sources())
        places = {r: layout.place(s.namespace, r, s.epoch) for r, s in sources.items()}
        for replica in self._telling:
            if not sources.get(replica, NOWHERE).is_heard or self._telling.place(replica) != places[replica]:
                await self._telling.give_up(replica)
        pipe = self._client.pipeline(transaction=False)
        pipe.info("server")
        lease_ms = int(self._config.lease_s * 1000)
        for replica, source in sources.items():
            if source.is_heard:
                pipe.set(places[replica].owner, self._id, nx=True, get=True, px=lease_ms)
            else:
                pipe.get(places[replica].owner)
            pipe.get(places[replica].head)
        info, *found = await pipe.execute()
        if self._run_id not in (None, info["run_id"]):
            self._run_id = None
            raise Lost("Redis is another one than before")
        self._run_id = info["run_id"]
        mine = self._id.encode()
        renewals = self._client.pipeline(transaction=False)
        for (replica, source), owner, head in zip(sources.items(), found[::2], found[1::2], strict=True):
            where = places[replica]
            if source.is_heard and owner in (None, mine):
                # A lease that ran out may have been another's meanwhile, and then another's word stands there.
                if not self._telling.stands(replica, head):
                    self._readings.hand_over(replica)
                    self._telling.begin(replica, where)
                renewals.pexpire(where.owner, lease_ms)
                continue
            self._telling.end(replica)
            self._readings.note(replica, where, source, owner is not None, now_s)
        self._readings.keep(sources)
        await renewals.execute()
        if now_s - self._renewed_s >= layout.KEPT_MS / 4000:
            self._renewed_s = now_s
            await self._telling.renew()

    def _lose(self, error: Exception) -> None:
        """On our own from here: nothing is remembered for others, and soon nothing believed of them."""
        self.num_failures += 1
        said = client.said(error)
        if self.problem is None:
            logger.warning("registry at %s is gone (%s); on what this router hears itself", self.where, said)
        self.problem = said
        self._telling.forget()
        self._claimed_s = float("-inf")
        self._readings.rewind()
        self._busy.forget()
        if self._clock() - self._reached_s > self._config.believed_s:
            self._readings.keep(())

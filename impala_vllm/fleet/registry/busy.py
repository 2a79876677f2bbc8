"""How busy each router keeps its replicas: one hash in Redis, a field a router, written and read with every beat."""

from collections.abc import Mapping

import msgspec

from impala_vllm.fleet.places import Replica, ServerId
from impala_vllm.fleet.registry import layout
from impala_vllm.fleet.registry.client import RegistryConfig
from impala_vllm.fleet.registry.layout import Client
from impala_vllm.fleet.scoring import Elsewhere, Load

LOADS = "impala:1:loads"
"""Hash: router -> how busy it keeps each replica. The number in it changes with each beat; one that does not is old."""


class Beat(msgspec.Struct, array_like=True):
    """How busy a router keeps its replicas."""

    number: int
    loads: list[tuple[str, int, int, float, int, int]]
    """Server, rank, running, pending seconds, live tokens, live traces."""


class Busy:
    """One router's. Puts what others say into `Load.elsewhere`."""

    def __init__(self, client: Client, router: str, loads: Mapping[Replica, Load], config: RegistryConfig) -> None:
        self._client = client
        self._router = router
        self._loads = loads
        self._config = config
        self._num_beats = 0
        self._beats: dict[str, tuple[int, float]] = {}
        """Of other routers: number, and when it was new."""

    async def exchange(self, now_s: float) -> None:
        """Say how busy this router keeps each replica, and hear it of the others."""
        self._num_beats += 1
        rows: list[tuple[str, int, int, float, int, int]] = [
            (r.server, r.dp_rank, load.num_running, round(load.pending_s, 4), load.live_tokens, load.num_traces)
            for r, load in self._loads.items()
            if load.num_running or load.live_tokens
        ]
        pipe = self._client.pipeline(transaction=False)
        pipe.hset(LOADS, self._router, msgspec.msgpack.encode(Beat(self._num_beats, rows)))
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

    async def leave(self) -> None:
        """Say no more."""
        await self._client.hdel(LOADS, self._router)

    def forget(self) -> None:
        """Nothing is known of others."""
        for load in self._loads.values():
            load.elsewhere = Elsewhere()

    def _beat(self, router: str, packed: bytes, now_s: float) -> Beat | None:
        """Another router's; None: it is our own, nobody's, or old."""
        if router == self._router:
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

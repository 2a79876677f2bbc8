"""What vLLM's OffloadingConnector asks about tiers, answered from core's allocator, chains and planner.

Runs on the engine loop's thread and never waits: bytes are moved by the worker (HBM and host) and by the NVMe store's
own thread. A hit is promised only for what is ready in host; NVMe is read into host first and verified there. Until
policy is attached the tiers are plain caches, the least recently used goes first.
"""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, cast

from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from impala_vllm.adapters.vllm.tiers.adapters import Adapters
from impala_vllm.adapters.vllm.tiers.host import HostTier
from impala_vllm.adapters.vllm.tiers.host_loads import HostLoads
from impala_vllm.adapters.vllm.tiers.nvme import NvmeTier
from impala_vllm.adapters.vllm.tiers.one_shots import OneShots
from impala_vllm.adapters.vllm.tiers.turns import Turn, Turns
from impala_vllm.core.allocator import Key
from impala_vllm.core.types import TraceId

if TYPE_CHECKING:
    from impala_vllm.core.idle import IdleKv
    from impala_vllm.core.planner import Planner


_HIT, _MISS = LookupResult.HIT, LookupResult.MISS
"""Asked for chunk by chunk, and to look a member of an enum up is slow."""


class TierManager(OffloadingManager):
    """Host slots, and an NVMe tier behind them where there is one."""

    def __init__(
        self,
        num_chunks: int,
        chunk_bytes: int,
        tokens_per_chunk: int,
        nvme: NvmeTier | None = None,
        clock: Callable[[], float] = time.monotonic,
        enable_events: bool = False,
        on_shutdown: Callable[[], None] | None = None,
    ) -> None:
        """`on_shutdown` lets go of the memory that the slots lie in, after the last job."""
        self.tokens_per_chunk = tokens_per_chunk
        self.chunk_bytes = chunk_bytes
        self.turns = Turns(tokens_per_chunk)
        self.host = HostTier(num_chunks, self.turns, self._worth, self._left_host, enable_events)
        self._ready = self.host.pool.ready
        self.nvme = nvme
        self.one_shots = OneShots()
        self.adapters = Adapters()
        self.num_resumes = self.num_resumes_found = 0
        """Turns of known traces, and those of them whose KV HBM and host had when they arrived."""
        self.loads = HostLoads(chunk_bytes)
        self.num_stored = self.num_refused = 0
        """Chunks."""
        self.host_pays = True
        """Loads from host are quicker than computing, as far as policy knows."""
        self.takes_nothing = False
        """What HBM has is not to be found again: it is of other weights than the engine's."""
        self.writes_unasked = True
        """Without policy all that is stored goes on to NVMe, as with upstream's tiers."""
        self._idle: IdleKv | None = None
        self._clock = clock
        self._on_shutdown = on_shutdown
        if nvme is not None:
            nvme.bind(self.host, self.turns, self.one_shots)

    def attach(self, idle: "IdleKv", planner: "Planner", supersedes: bool = True) -> None:
        """Let policy say what is worth what from now on, and whether a new turn supersedes what it does not use."""
        self._idle, self.loads.link = idle, planner.host
        self.host.chains.supersedes = supersedes
        if self.nvme is not None:
            self.nvme.attach(idle, planner)
            self.nvme.chains.supersedes = supersedes

    def detach(self) -> None:
        """Policy is gone: plain caches again, and nothing is any trace's."""
        self._idle = self.loads.link = None
        self.host_pays = True
        self.forget_all()
        if self.nvme is not None:
            self.nvme.detach()

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        turn = self.turns.open(req_context.req_id)
        # A request's `kv_load_tiers`. Upstream's own tiers ask it of those behind host alone: all goes through host.
        turn.skips_nvme |= not req_context.load_tier_filter.allows(Medium.STORAGE, Locality.LOCAL)
        return RequestOffloadingContext()

    def leave_out(self, req_id: str) -> None:
        """Keep nothing of the request and look for nothing: see `Adapters`. Before it arrives."""
        self.turns.open(req_id)
        self.turns.left_out.add(req_id)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        if req_context.req_id in self.turns.left_out:
            return _MISS
        if key in self._ready:
            return _HIT if self.host_pays else _MISS
        if self.nvme is not None and self.nvme.is_reading(key):
            return LookupResult.HIT_PENDING if self._waits_for(key, req_context) else _MISS
        # With policy, whoever waits has been promoted before it is asked for.
        if self.nvme is not None and self._idle is None and self._promote(self.nvme, key, req_context):
            return LookupResult.HIT_PENDING
        return _MISS

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> CacheHitSource:
        return CacheHitSource.DISK if self.nvme is not None and key in self.nvme.promoted else CacheHitSource.HOST

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        listed = list(keys)
        turn = self._note_keys(listed, req_context)
        turn.load = self.host.pool.pin(listed)
        self.loads.asked(len(listed))
        return CPULoadStoreSpec(list(turn.load.slots))

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        turn = self.turns.get(req_context.req_id)
        if turn is None or turn.load is None:
            return
        self.loads.arrived(len(turn.load.keys))
        if self.nvme is not None:
            self.nvme.used(turn.load.keys)
        turn.load.release()
        turn.load = None
        self._close_if_done(req_context.req_id)

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Recency comes with whole turns, through `arrive` and `finish`."""

    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        self.poll()
        if self.takes_nothing or req_context.req_id in self.turns.left_out:
            return PrepareStoreOutput([], CPULoadStoreSpec([]), [])
        pool = self.host.pool
        missing = pool.missing(keys)
        turn = self._note_keys(list(keys), req_context)
        evicted = self._make_room(len(missing), turn, req_context)
        fitting = missing[: pool.num_free]
        self.num_refused += len(missing) - len(fitting)
        slots = pool.reserve(fitting) or []
        if fitting:
            turn.stores.append(self._root_first(fitting, req_context))
        return PrepareStoreOutput(fitting, CPULoadStoreSpec(slots), [OffloadKey(key) for key in evicted])

    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        turn = self.turns.get(req_context.req_id)
        filling = self.host.pool.filling(turn.stored(keys) if turn is not None else keys)
        if success:
            self.host.fill(filling, turn.trace_id if turn is not None else None)
            self.num_stored += len(filling)
        else:
            self.host.pool.abort(filling)
        if turn is None:
            return
        self.one_shots.stored(turn.trace_id, len(filling) if success else 0)
        self.turns.changed(turn.trace_id)
        if turn.may_write is not None:
            self.turns.decide(turn, turn.may_write())
            self._write(turn)
        if success and self.nvme is not None and (turn.writes or (self._idle is None and self.writes_unasked)):
            before = dict(zip(filling, self._before(turn, filling, req_context), strict=True))
            self.nvme.write(filling, turn.trace_id, self._clock(), before.__getitem__)
        self._close_if_done(req_context.req_id)

    def on_request_finished(self, req_context: ReqContext) -> None:
        turn = self.turns.get(req_context.req_id)
        if turn is not None:
            turn.is_finished = True
            if self.nvme is not None:
                self.nvme.leave(turn)
            self._close_if_done(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self.poll()

    def reset_cache(self) -> None:
        moving = self.nvme.reset() if self.nvme is not None else set[Key]()
        self.host.clear(moving)
        self.turns.reset()
        self.loads.reset()

    def take_events(self) -> Iterable[OffloadingEvent]:
        return self.host.take_events()

    def shutdown(self) -> None:
        if self.nvme is not None:
            self.nvme.close()
        if self._on_shutdown is not None:
            self._on_shutdown()

    def arrive(
        self, req_id: str, trace_id: TraceId | None, keys: Sequence[Key], stem_chunks: int, writes: bool
    ) -> None:
        """A turn is about to be queued; `keys` name its prompt's full chunks, of which the first are a shared stem.

        `writes`: they belong on NVMe too, as they are stored.
        """
        self.poll()
        turn = self.turns.open(req_id)
        if req_id in self.turns.left_out:
            return
        turn.trace_id, turn.keys, turn.writes = trace_id, keys, writes
        self._write(turn, self._use(turn, stem_chunks))

    def finish(self, req_id: str, keys: Sequence[Key], stem_chunks: int, writes: bool) -> None:
        """A turn has ended with the chunks `keys`, output included. `writes`: they belong on NVMe too."""
        turn = self.turns.get(req_id)
        if turn is None or req_id in self.turns.left_out:
            return
        turn.keys = keys
        self.turns.decide(turn, writes)
        self._write(turn, self._use(turn, stem_chunks))

    def forget(self, trace_id: TraceId) -> None:
        """The trace is over, its open turns are nobody's."""
        self.host.chains.release(trace_id)
        self.turns.forget(trace_id)
        self.one_shots.ended(trace_id)
        if self.nvme is not None:
            self.nvme.chains.release(trace_id)

    def forget_all(self) -> None:
        """There are no traces any more."""
        self.host.chains.release_all()
        self.turns.forget_all()
        if self.nvme is not None:
            self.nvme.forget_all()

    def stats(self) -> dict[str, float]:
        """Counters and gauges, for the snapshot."""
        found = {
            "host_size_bytes": float(self.host.pool.num_slots * self.chunk_bytes),
            "host_used_bytes": float(len(self.host.pool) * self.chunk_bytes),
            "host_load_bytes": float(self.loads.num_chunks * self.chunk_bytes),
            "host_store_bytes": float(self.num_stored * self.chunk_bytes),
            "host_refused_bytes": float(self.num_refused * self.chunk_bytes),
            "host_evicted_bytes": float(self.host.num_evicted * self.chunk_bytes),
            "resumed_turns": float(self.num_resumes),
            "resumed_turns_found": float(self.num_resumes_found),
        }
        return found | (self.nvme.stats() if self.nvme is not None else {})

    def _waits_for(self, key: OffloadKey, req_context: ReqContext) -> bool:
        """Is a chunk that is being read worth waiting for?"""
        if self.nvme is None or self.nvme.is_late(key, self._clock()):
            return False
        turn, end = self.turns.get(req_context.req_id), req_context.get_offload_key_position(key)
        if turn is not None and turn.skips_nvme:
            return False
        if self._idle is None or turn is None or end is None:
            return True
        return end <= turn.awaited_chunks * self.tokens_per_chunk

    def _use(self, turn: Turn, stem_chunks: int) -> range:
        """Returns which of its chunks are known to be on NVMe; there may be others."""
        if turn.trace_id is None:
            self._touch(turn)
            return range(0)
        self.host.chains.use(turn.trace_id, turn.keys, stem_chunks)
        self.turns.remember(turn)
        return self.nvme.chains.use(turn.trace_id, turn.keys, stem_chunks) if self.nvme is not None else range(0)

    def _write(self, turn: Turn, written: range = range(0)) -> None:
        if turn.writes and self.nvme is not None:
            keys = [*turn.keys[: written.start], *turn.keys[written.stop :]]
            self.nvme.write(keys, turn.trace_id, self._clock(), lambda key: turn.at(turn.own_keys().get(key, 0) - 1))

    def _note_keys(self, keys: Sequence[Key], req_context: ReqContext) -> Turn:
        """Policy names a prompt's chunks, if it is there; the connector names all, root first and bit by bit."""
        turn = self.turns.open(req_context.req_id)
        if self._idle is None:
            turn.seen += keys
        if self.nvme is not None and keys and self._place(req_context, keys[-1]) >= len(turn.keys):
            turn.behind.update((self._place(req_context, key), key) for key in keys)
        return turn

    def _place(self, req_context: ReqContext, key: Key) -> int:
        """Which of its request's chunks it is, the root being 0; -1: none of them."""
        return (req_context.get_offload_key_position(OffloadKey(key)) or 0) // self.tokens_per_chunk - 1

    def _root_first(self, keys: Sequence[Key], req_context: ReqContext) -> Sequence[Key]:
        """A model's several KV cache groups, of which policy knows nothing, come one behind the other."""
        if self._idle is not None:
            return keys
        end = _position(req_context)
        return sorted(keys, key=lambda key: end(key) or 0)

    def _before(self, turn: Turn, keys: Sequence[Key], req_context: ReqContext) -> list[Key | None]:
        """What lies before each of these chunks of the turn's, which come root first."""
        if not keys:
            return []
        first = self._place(req_context, keys[0])
        # With policy there is one group, and then none is left out.
        if self._idle is not None and self._place(req_context, keys[-1]) - first == len(keys) - 1:
            return [turn.at(first - 1), *keys[:-1]]
        return [turn.at(self._place(req_context, key) - 1) for key in keys]

    def _touch(self, turn: Turn) -> None:
        """Nobody's turn was here: what it used goes later than what was used before."""
        self.host.chains.touch(turn.keys or turn.seen)
        if self.nvme is not None:
            self.nvme.chains.touch(turn.keys or turn.seen)

    def _close_if_done(self, req_id: str) -> None:
        turn = self.turns.close_if_done(req_id)
        if turn is not None and turn.trace_id is None:
            self._touch(turn)

    def _promote(self, nvme: NvmeTier, key: Key, req_context: ReqContext) -> bool:
        """Start to read one chunk, but not in the place of another one of the request's."""
        turn = self.turns.get(req_context.req_id)
        if turn is not None and turn.skips_nvme:
            return False
        return nvme.promote([key], None, self._clock(), _position(req_context), ())

    def _make_room(self, num_chunks: int, turn: Turn, req_context: ReqContext) -> list[Key]:
        spared = (turn.trace_id,) if turn.trace_id is not None else ()
        # HBM has what is being stored: with nothing below, a copy is worth no more than the one that it displaces.
        limit = turn.trace_id if self._idle is not None and self.nvme is None else None
        # No trace is known to come back for it, and it does not go on to NVMe either.
        only_nobodys = self._idle is not None and turn.trace_id is None
        return self.host.make_room(num_chunks, _position(req_context), spared, limit, only_nobodys)

    def _left_host(self, keys: Sequence[Key]) -> None:
        if self.nvme is not None:
            self.nvme.left_host(keys)

    def poll(self) -> None:
        """Take note of what the disk has done, and let it go on; an idle engine does so when asked for its figures."""
        if self.nvme is not None:
            self.nvme.poll(self._clock())

    def _worth(self, trace_id: TraceId) -> float:
        return self._idle.worth_in_host(trace_id) if self._idle is not None else 0.0


def _position(req_context: ReqContext) -> Callable[[Key], int | None]:
    """Where in its request a chunk ends, in tokens; None: it is none of it."""
    return cast("Callable[[Key], int | None]", req_context.get_offload_key_position)

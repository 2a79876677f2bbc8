"""What the tiers remember of open turns, and of each trace the chunks of its newest one."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from impala_vllm.core.allocator import Key, Pin
from impala_vllm.core.planner import NOBODY, Below, Queue
from impala_vllm.core.types import TraceId


@dataclass(slots=True)
class Turn:
    """One request that vLLM has not let go of."""

    trace_id: TraceId | None = None
    keys: Sequence[Key] = ()
    """Its full chunks, root first."""
    seen: list[Key] = field(default_factory=list[Key])
    """The same as far as stored or loaded, where policy does not name them; those of several groups mixed."""
    behind: dict[int, Key] = field(default_factory=dict[int, Key])
    """Chunks behind `keys` by their place, as far as stored or loaded."""
    known_chunks: int = 0
    """Leading chunks that the trace's turn before it had, until it has been looked for."""
    hbm_tokens: int = 0
    """Leading tokens that HBM had when last looked at."""
    queue: Queue = NOBODY
    """What stood around it then."""
    awaited_chunks: int = 0
    """Leading chunks worth waiting for: what NVMe has of them is read first."""
    nvme_tokens: int = 0
    """Of those, what has to come from NVMe."""
    asked_chunks: int = 0
    """Leading chunks of which what NVMe had was asked for."""
    skips_nvme: bool = False
    """NVMe was too late, or host has no room for it: what lies there is computed."""
    writes: bool = False
    """What it stores goes on to NVMe."""
    may_write: Callable[[], bool | None] | None = None
    """Tells that while it is not known yet: None until it is."""
    load: Pin | None = None
    stores: list[Sequence[Key]] = field(default_factory=list[Sequence[Key]])
    """Chunks of each store under way, root first."""
    is_finished: bool = False
    _own: tuple[Sequence[Key], dict[Key, int]] = field(default_factory=lambda: ((), dict[Key, int]()))

    def own_keys(self) -> dict[Key, int]:
        """The place of each of `keys`."""
        if self._own[0] is not self.keys:
            self._own = self.keys, dict(zip(self.keys, range(len(self.keys)), strict=True))
        return self._own[1]

    def stored(self, keys: Collection[Key]) -> Sequence[Key]:
        """The store of these chunks is over. Returns them root first: vLLM names them as a set."""
        for index, chunks in enumerate(self.stores):
            if chunks[0] in keys:
                return self.stores.pop(index)
        return tuple(keys)

    def at(self, place: int) -> Key | None:
        """The chunk there, output that was stored included; None: it is not known, or before the first."""
        if place < 0:
            return None
        return self.keys[place] if place < len(self.keys) else self.behind.get(place)


@dataclass(slots=True)
class Turns:
    """By request id. One writer."""

    tokens_per_chunk: int
    changed_traces: dict[TraceId, None] = field(default_factory=dict[TraceId, None])
    """Whose chunks came or went; the reader clears it."""
    undecided: set[TraceId] = field(default_factory=set[TraceId])
    """Those in a first turn of which it is not known whether it belongs on NVMe: in host they go last."""
    left_out: set[str] = field(default_factory=set[str])
    """Open turns of which tiers keep nothing and have nothing."""
    below: dict[TraceId, Below] = field(default_factory=dict[TraceId, Below])
    """What tiers had of a trace's newest turn when last asked, until a tier gave up any chunk or it is another turn."""
    _open: dict[str, Turn] = field(default_factory=dict[str, Turn])
    _keys: dict[TraceId, Sequence[Key]] = field(default_factory=dict[TraceId, Sequence[Key]])

    def get(self, req_id: str) -> Turn | None:
        return self._open.get(req_id)

    def open(self, req_id: str) -> Turn:
        """The turn, a new one where it is not known."""
        turn = self._open.get(req_id)
        if turn is None:
            turn = self._open[req_id] = Turn()
        return turn

    def decide(self, turn: Turn, writes: bool | None) -> None:
        """It is known now whether what the turn stores goes on to NVMe; None: it is not."""
        turn.writes = bool(writes)
        if writes is not None and turn.may_write is not None:
            turn.may_write = None
            if turn.trace_id is not None:
                self.undecided.discard(turn.trace_id)

    def close_if_done(self, req_id: str) -> Turn | None:
        """Forget the turn once it has finished and nothing of it moves. Returns it then."""
        turn = self._open.get(req_id)
        if turn is not None and turn.is_finished and turn.load is None and not turn.stores:
            self.left_out.discard(req_id)
            return self._open.pop(req_id)
        return None

    def remember(self, turn: Turn) -> None:
        """Its chunks are what the trace will ask for next."""
        if turn.trace_id is not None:
            self._keys[turn.trace_id] = turn.keys
            self.lost(turn.trace_id)

    def is_wanted(self, key: Key) -> bool:
        """Some turn that has not ended has the chunk. O(open turns)."""
        return any(not turn.is_finished and key in turn.own_keys() for turn in self._open.values())

    def give_up(self, key: Key) -> None:
        """The chunk is not read in time: whoever waits for it computes. O(open turns)."""
        for turn in self._open.values():
            turn.skips_nvme |= key in turn.own_keys()

    def changed(self, trace_id: TraceId | None) -> None:
        if trace_id is not None:
            self.changed_traces[trace_id] = None

    def lost(self, trace_id: TraceId) -> None:
        """A tier may have less of the trace than it had."""
        self.below.pop(trace_id, None)
        self.changed(trace_id)

    def went(self, owners: Iterable[TraceId]) -> None:
        """A tier gave up chunks, and these are whose they were: others may have counted on the same ones."""
        self.below.clear()
        for trace_id in owners:
            self.changed(trace_id)

    def keys_of(self, trace_id: TraceId) -> Sequence[Key]:
        """Chunks of the trace's newest turn, root first."""
        return self._keys.get(trace_id, ())

    def forget(self, trace_id: TraceId) -> None:
        """The trace is over; open turns of it are nobody's. O(open turns)."""
        if self._keys.pop(trace_id, None) is not None:
            self.lost(trace_id)
        self.undecided.discard(trace_id)
        for turn in self._open.values():
            if turn.trace_id == trace_id:
                turn.trace_id, turn.writes, turn.may_write = None, False, None

    def forget_all(self) -> None:
        """There are no traces any more."""
        for turn in self._open.values():
            turn.trace_id, turn.writes, turn.may_write = None, False, None
        self.undecided.clear()
        self._keys.clear()
        self.below.clear()
        self.changed_traces.clear()

    def reset(self) -> None:
        """What was stored or loaded is void; open turns begin again."""
        self.below.clear()
        self.changed_traces.update(dict.fromkeys(self._keys))
        for req_id, turn in list(self._open.items()):
            turn.load = None
            turn.stores.clear()
            turn.seen.clear()
            self.close_if_done(req_id)

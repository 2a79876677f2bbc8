"""When a silent trace's KV goes from NVMe to host, before its next turn asks for it.

A bet, so it is kept cheap: only while no turn waits, in pieces that are read in a moment, and only
what will probably be asked for before host has to give it up. What becomes of the bets is counted.
"""

import heapq
from collections.abc import Callable, Collection, Iterable, Sequence

from impala_vllm.core.allocator import Key, SlotPool
from impala_vllm.core.planner import Planner
from impala_vllm.core.reach import leading
from impala_vllm.core.types import TraceId

EVERY_S = 0.05
MAX_LOOKED = 8
"""Traces looked at in one go."""
PIECE_S = 0.1
"""Of reading, at a time: a turn that arrives waits no longer for a disk that is busy with a bet."""
LIFE_MEMORY_S = 10.0
"""Over which it is measured how long host keeps what nobody asks for."""


class Recalls:
    """What is due, and what came of it. Times are the engine's clock."""

    def __init__(
        self,
        host: SlotPool,
        chunk_bytes: int,
        keys_of: Callable[[TraceId], Sequence[Key]],
        ready: Callable[[], Collection[Key]],
        read: Callable[[Sequence[Key], TraceId, float], bool],
    ) -> None:
        """`keys_of` a trace's newest turn; what NVMe has `ready`; `read` starts to bring chunks of a trace to host."""
        self.num_recalled = self.num_wasted = 0
        """Chunks."""
        self._host = host
        self._chunk_bytes = chunk_bytes
        self._keys_of, self._ready, self._read = keys_of, ready, read
        self._due: list[tuple[float, int, TraceId]] = []
        self._expected: set[TraceId] = set()
        self._num_due = 0
        self._looked_s = 0.0
        self._unused: set[Key] = set()
        """Recalled, and neither used nor given up since."""
        self._num_evicted = 0
        self._evicted_per_s = 0.0

    def expect(self, trace_id: TraceId, planner: Planner, now: float) -> None:
        """The trace is silent and not all of it is in host: recall it in time."""
        if trace_id not in self._expected:
            due_s = planner.recall_due_s(trace_id, len(self._behind(trace_id)) * self._chunk_bytes, now)
            if due_s is not None:
                self._wait_until(due_s, trace_id)

    def start(self, planner: Planner, now: float, is_wanted: bool) -> None:
        """Start what is due, a few times a second. `is_wanted`: turns wait, disk and room are theirs."""
        past_s = now - self._looked_s
        if past_s < EVERY_S:
            return
        self._looked_s = now
        self._evicted_per_s += min(1.0, past_s / LIFE_MEMORY_S) * (self._num_evicted / past_s - self._evicted_per_s)
        self._num_evicted = 0
        if is_wanted:
            return
        for _ in range(MAX_LOOKED):
            if not self._due or self._due[0][0] > now or planner.nvme.wait_s() > PIECE_S:
                return
            self._recall(heapq.heappop(self._due)[2], planner, now)

    def came(self, keys: Iterable[Key]) -> None:
        """A recall has been read."""
        before = len(self._unused)
        self._unused.update(keys)
        self.num_recalled += len(self._unused) - before

    def used(self, keys: Iterable[Key]) -> None:
        """Chunks in host were loaded into HBM."""
        if self._unused:
            self._unused.difference_update(keys)

    def left_host(self, keys: Sequence[Key]) -> None:
        """Host gave chunks up."""
        self._num_evicted += len(keys)
        wasted = self._unused.intersection(keys) if self._unused else ()
        self.num_wasted += len(wasted)
        self._unused.difference_update(wasted)

    def forget(self) -> None:
        """The tiers are empty, or there are no traces any more."""
        self._due.clear()
        self._expected.clear()
        self._unused.clear()

    def _recall(self, trace_id: TraceId, planner: Planner, now: float) -> None:
        self._expected.discard(trace_id)
        behind = self._behind(trace_id)
        # When it is due was asked as it fell silent: asked again, what is likely always lies a little ahead.
        if not behind or planner.recall_due_s(trace_id, 0, now) is None:
            return
        life_s = self._host.num_slots / self._evicted_per_s if self._evicted_per_s else None
        if not planner.recall_pays(trace_id, life_s, now):
            return
        size = max(1, int(PIECE_S * planner.nvme.bytes_per_s) // self._chunk_bytes)
        if self._read(behind[:size], trace_id, now) and len(behind) > size:
            self._wait_until(now, trace_id)

    def _behind(self, trace_id: TraceId) -> Sequence[Key]:
        """What host lacks of it, as far as NVMe has it."""
        keys = self._keys_of(trace_id)
        start = leading(keys, self._host.keys().__contains__)
        return keys[start : leading(keys, self._ready().__contains__, start)]

    def _wait_until(self, due_s: float, trace_id: TraceId) -> None:
        self._num_due += 1
        self._expected.add(trace_id)
        heapq.heappush(self._due, (due_s, self._num_due, trace_id))

"""How much KV belongs to traces of a single turn, and how much of that reached NVMe: what the write gate is for."""

from impala_vllm.core.types import TraceId


class OneShots:
    """Totals in chunks, of traces that have ended. O(1)."""

    def __init__(self) -> None:
        self.num_stored = self.num_written = 0
        self._live: dict[TraceId, list[int]] = {}
        """Of traces in their first turn: stored in host, written to NVMe."""

    def began(self, trace_id: TraceId) -> None:
        """Its first turn has arrived."""
        self._live[trace_id] = [0, 0]

    def came_back(self, trace_id: TraceId) -> None:
        """It is no one-shot."""
        self._live.pop(trace_id, None)

    def stored(self, trace_id: TraceId | None, num_chunks: int) -> None:
        if trace_id is not None and (counts := self._live.get(trace_id)) is not None:
            counts[0] += num_chunks

    def written(self, trace_id: TraceId | None, num_chunks: int) -> None:
        if trace_id is not None and (counts := self._live.get(trace_id)) is not None:
            counts[1] += num_chunks

    def ended(self, trace_id: TraceId) -> None:
        """The trace is over."""
        stored, written = self._live.pop(trace_id, (0, 0))
        self.num_stored += stored
        self.num_written += written

    def end_all(self) -> None:
        """Nothing comes any more: whatever had one turn was a one-shot."""
        for trace_id in list(self._live):
            self.ended(trace_id)

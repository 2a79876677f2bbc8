"""The baseline: a request belongs to the owner of the longest prefix it knows, and owns all of it from then on."""

from bisect import bisect_left

from impala_vllm.core.types import Arrival, BlockHash, Finish, Link, Namespace, RequestId, Source, TraceId

MIN_BLOCKS = 4
"""A shorter match starts a new trace; one setting for all logs."""


class Naive:
    """Forgets nothing and knows no parents."""

    def __init__(self, min_blocks: int = MIN_BLOCKS) -> None:
        self._min_blocks = min_blocks
        self._owners: dict[Namespace, dict[BlockHash, tuple[TraceId, RequestId]]] = {}
        self._num_traces = 0

    def arrive(self, arrival: Arrival, now: float) -> Link:
        """Link by prefix alone. O(prompt blocks)."""
        owners = self._owners.setdefault(arrival.namespace, {})
        blocks = arrival.blocks
        # Hashes are chained: one that is unknown has only unknown ones after it.
        matched = bisect_left(blocks, True, key=lambda block: block not in owners)
        trace_id, before = owners[blocks[matched - 1]] if matched >= self._min_blocks else (self._new(), None)
        owners.update(dict.fromkeys(blocks, (trace_id, arrival.request_id)))
        return Link(trace_id, None, Source.CONTINUATION if before else Source.NEW, 0.5, matched, before)

    def finish(self, finish: Finish, now: float) -> None:
        """The next prompt holds the output anyway."""

    def _new(self) -> TraceId:
        self._num_traces += 1
        return TraceId(f"n{self._num_traces}")

"""The turns that have come and not gone: whose they are, which of them wait, and what their traces teach.

Tells gap forecast and output lengths what happens, and notes whose idle KV has to be judged anew.
"""

from typing import Generic, TypeVar

from impala_vllm.core.gaps import GapForecast
from impala_vllm.core.lengths import OutputLengths
from impala_vllm.core.types import RequestId, TraceId


class OpenTurn:
    """What policy remembers of an unfinished request."""

    __slots__ = ("arrived_s", "has_begun", "is_sample", "reach_blocks", "stem_blocks", "trace_id")

    def __init__(self, trace_id: TraceId | None, arrived_s: float, is_sample: bool = False) -> None:
        """`is_sample`: one more answer to a turn that is open already."""
        self.trace_id = trace_id
        self.is_sample = is_sample
        self.arrived_s = arrived_s
        self.reach_blocks = self.stem_blocks = 0
        self.has_begun = False


TurnT = TypeVar("TurnT", bound=OpenTurn)


class OpenTurns(Generic[TurnT]):
    """By request id, with counts by trace. Every verb is O(1)."""

    def __init__(self, gaps: GapForecast, lengths: OutputLengths) -> None:
        self.changed: dict[TraceId, None] = {}
        """Traces of which a turn came or went; whoever judges them clears it."""
        self._gaps = gaps
        self._lengths = lengths
        self._turns: dict[RequestId, TurnT] = {}
        self._known: set[TraceId] = set()
        self._open_of: dict[TraceId, int] = {}
        """Unfinished turns by trace."""
        self._queued_of: dict[TraceId, int] = {}
        """Those of them that have not begun."""
        self._tokens_of: dict[TraceId, int] = {}

    def __len__(self) -> int:
        return len(self._turns)

    @property
    def num_traces(self) -> int:
        """Those with a turn, open or ended, that are not forgotten."""
        return len(self._known)

    def __getitem__(self, request_id: RequestId) -> TurnT:
        return self._turns[request_id]

    def get(self, request_id: RequestId) -> TurnT | None:
        return self._turns.get(request_id)

    def is_open(self, trace_id: TraceId) -> bool:
        """Has the trace an unfinished turn?"""
        return trace_id in self._open_of

    def runs(self, trace_id: TraceId) -> bool:
        """Has it one, and have all of them begun?"""
        return trace_id in self._open_of and trace_id not in self._queued_of

    def num_tokens(self, trace_id: TraceId) -> int:
        """Prompt and answer of its last ended turn; the prompt of its first where none has ended."""
        return self._tokens_of.get(trace_id, 0)

    def arrive(
        self, request_id: RequestId, turn: TurnT, num_tokens: int, now: float, parent: TraceId | None = None
    ) -> None:
        """A request of `num_tokens` asks to run; its trace is a child of `parent`."""
        self._turns[request_id] = turn
        trace_id = turn.trace_id
        if trace_id is None:
            return
        self._known.add(trace_id)
        self._gaps.resume(trace_id, now)
        for count in (self._open_of, self._queued_of):
            count[trace_id] = count.get(trace_id, 0) + 1
        self._tokens_of.setdefault(trace_id, num_tokens)
        self.changed[trace_id] = None
        if parent is not None:
            self._gaps.delegate(parent)
            self.changed[parent] = None

    def begin(self, turn: TurnT) -> bool:
        """The turn waits no longer. False: it did not before, or is nobody's."""
        if turn.has_begun:
            return False
        turn.has_begun = True
        if turn.trace_id is None:
            return False
        _less(self._queued_of, turn.trace_id)
        return True

    def finish(
        self, request_id: RequestId, num_tokens: int, num_output: int | None, signature: str, now: float
    ) -> TurnT | None:
        """The request has ended with `num_tokens` in all, by a tool call or for the reason that `signature` names.

        `num_output`: what it generated; None where it was broken off and says nothing of how long answers are.
        Returns None where nobody knows the request.
        """
        turn = self._turns.pop(request_id, None)
        if turn is None:
            return None
        trace_id = self.trace_of(turn)
        if num_output is not None:
            self._lengths.observe(trace_id, num_output)
        self.begin(turn)
        if trace_id is not None:
            if _less(self._open_of, trace_id):
                self._gaps.finish(trace_id, now, signature)
            self._tokens_of[trace_id] = num_tokens
            self.changed[trace_id] = None
        return turn

    def drain(self, parent: TraceId, now: float) -> None:
        """The last child that the trace waited for is done."""
        self._gaps.drain(parent, now)
        self.changed[parent] = None

    def trace_of(self, turn: TurnT) -> TraceId | None:
        """Whose turn it is. None: nobody's, or the table has forgotten the trace while the turn was open."""
        return turn.trace_id if turn.trace_id in self._known else None

    def forget_all(self) -> None:
        """There are no traces any more; open turns are nobody's."""
        for trace_id in list(self._known):
            self.forget(trace_id)

    def forget(self, trace_id: TraceId) -> None:
        """The trace left the table."""
        self._known.discard(trace_id)
        for count in (self._open_of, self._queued_of, self._tokens_of):
            count.pop(trace_id, None)
        self._gaps.forget(trace_id)
        self._lengths.forget(trace_id)


def _less(counts: dict[TraceId, int], trace_id: TraceId) -> bool:
    """Count one less. True: that was the last."""
    left = counts.pop(trace_id, 1) - 1
    if left:
        counts[trace_id] = left
    return not left

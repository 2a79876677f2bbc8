"""The running account of one trace, and of each of its open turns.

Every moment with an open turn is charged to one phase, that of the furthest turn; every moment without one between two
turns is a gap. So phases and gaps add up to the completion time, however turns overlap.
"""

from copy import copy

from impala_vllm.core.traces import State, Trace
from impala_vllm.core.types import Outcome, RequestId, Source
from impala_vllm.insight.ledger.record import VERSION, Again, Phase, Record, Stall, Tokens, digest

MAX_LOGGED_TURNS = 1000
"""Rows of `Record.log`: the longest agent runs measured have some 600 turns."""
_MAX_TURNS_BEFORE = 8
"""Turns that may yet be followed: as many as a trace has conversations."""


class Account:
    """What a trace has taken so far. `trace` None: of all requests without one."""

    __slots__ = (
        "again",
        "confidence",
        "ended_s",
        "failures",
        "gap_s",
        "gaps",
        "gpu_s",
        "is_settled",
        "log",
        "longest_gap_s",
        "num_open",
        "open_in",
        "outcome",
        "preemptions",
        "score",
        "sources",
        "spent",
        "started_s",
        "tokens",
        "trace",
        "turns",
        "turns_before",
    )

    def __init__(self, trace: Trace | None, now: float) -> None:
        self.trace = trace
        self.started_s = self.ended_s = now
        """`ended_s`: up to where phases or gaps are charged."""
        self.turns = self.num_open = self.failures = self.preemptions = self.gaps = 0
        self.open_in = [0] * len(Phase)
        """Open turns by phase."""
        self.spent = [0.0] * len(Phase)
        self.gap_s = self.longest_gap_s = self.gpu_s = 0.0
        self.tokens, self.again = Tokens(), Again()
        self.sources: dict[str, int] = {}
        self.confidence = 1.0
        self.outcome: str | None = None
        """As the client reported it."""
        self.score: float | None = None
        self.log: list[tuple[int, int, int, int, int, int]] = []
        self.turns_before: dict[RequestId, tuple[int, int]] = {}
        """Row and tokens of the newest turns."""
        self.is_settled = False
        """The newest record says all, and that it is finished."""

    def settle(self, now: float) -> None:
        """Charge the time since the last change."""
        elapsed_s = now - self.ended_s
        if elapsed_s <= 0.0:
            return
        for phase in (4, 3, 2, 1, 0):
            if self.open_in[phase]:
                self.spent[phase] += elapsed_s
                self.ended_s = now
                return

    def enter(self, now: float, source: Source | None, confidence: float) -> None:
        """A turn begins in the queue. Silence before it was a gap."""
        if self.num_open:
            self.settle(now)
        elif self.turns:
            gap_s = max(0.0, now - self.ended_s)
            self.gap_s += gap_s
            self.longest_gap_s = max(self.longest_gap_s, gap_s)
            self.gaps += 1
        self.ended_s = max(self.ended_s, now)
        self.open_in[Phase.QUEUE] += 1
        self.num_open += 1
        if source is not None:
            self.sources[source.value] = self.sources.get(source.value, 0) + 1
            self.confidence = min(self.confidence, confidence)
        self.is_settled = False

    def move(self, before: Phase, after: Phase, now: float) -> None:
        """A turn goes on to another phase."""
        self.settle(now)
        self.open_in[before] -= 1
        self.open_in[after] += 1

    def leave(self, phase: Phase, now: float) -> None:
        """A turn has ended in `phase`."""
        self.settle(now)
        self.open_in[phase] -= 1
        self.num_open -= 1
        self.turns += 1
        self.is_settled = False

    def note_turn(self, turn: "Turn", prompt: int, output: int, now: float) -> None:
        """Keep the ended turn for those that follow it, and its row."""
        if self.trace is None:
            return
        row = len(self.log)
        if row < MAX_LOGGED_TURNS and self.turns == row + 1:
            back = row - turn.follows if turn.follows is not None else 0
            start_ms = round((turn.arrived_s - self.started_s) * 1e3)
            self.log.append((start_ms, round((now - turn.arrived_s) * 1e3), prompt, output, turn.known_tokens, back))
        self.turns_before.pop(turn.turn_id, None)
        self.turns_before[turn.turn_id] = (row, prompt + output)
        if len(self.turns_before) > _MAX_TURNS_BEFORE:
            del self.turns_before[next(iter(self.turns_before))]

    def record(self, run: str, epoch_s: float, is_final: bool) -> Record:
        """The account as a line. `epoch_s`: Unix time of the clock's zero. Needs a trace."""
        trace = self.trace
        assert trace is not None
        name, tenant = trace.session_id, trace.namespace.tenant
        parent = trace.parent_trace_id
        return Record(
            trace=f"{run}/{trace.trace_id}",
            start=round(epoch_s + self.started_s, 3),
            end=round(epoch_s + self.ended_s, 3),
            v=VERSION,
            live=not is_final,
            parent=f"{run}/{parent}" if parent is not None else None,
            session=digest("session", name) if name is not None else None,
            tenant=digest("tenant", tenant) if tenant else None,
            turns=self.turns,
            sources=dict(self.sources),
            confidence=round(self.confidence, 3),
            outcome=self.outcome or _inferred(trace, is_final),
            reported=self.outcome is not None,
            score=self.score,
            tokens=copy(self.tokens),
            again=copy(self.again),
            gpu_s=round(self.gpu_s, 6),
            stall=Stall(*(round(s, 6) for s in self.spent)),
            gap_s=round(self.gap_s, 6),
            longest_gap_s=round(self.longest_gap_s, 3),
            gaps=self.gaps,
            preemptions=self.preemptions,
            failures=self.failures,
            stem=digest("stem", str(trace.opening)) if trace.opening is not None else None,
            log=tuple(self.log) if self.turns == len(self.log) else (),
        )


class Turn:
    """One open request."""

    __slots__ = (
        "account",
        "arrived_s",
        "computed_before",
        "decode_mark",
        "follows",
        "gpu_s",
        "known_tokens",
        "outputs_before",
        "phase",
        "previous_tokens",
        "request_id",
        "turn_id",
    )

    def __init__(self, account: Account, request_id: str, turn_id: RequestId, now: float) -> None:
        self.account = account
        self.request_id = request_id
        self.turn_id = turn_id
        self.arrived_s = now
        self.phase = Phase.QUEUE
        self.known_tokens = 0
        """Leading tokens of its prompt that had been sent before."""
        self.follows: int | None = None
        """Row of the turn it goes on from."""
        self.previous_tokens = 0
        """Context after that turn."""
        self.gpu_s = 0.0
        self.decode_mark = 0.0
        self.computed_before = 0
        """Tokens that were computed when it was preempted; 0: it was not."""
        self.outputs_before = 0
        """Output tokens it had when its prefill began."""


def _inferred(trace: Trace, is_final: bool) -> str:
    """How the trace ended, as far as its last turn shows."""
    if trace.num_running:
        return "running"
    last = trace.last_outcome
    if last in (Outcome.ABORT, Outcome.ERROR):
        return "aborted" if last is Outcome.ABORT else "error"
    if trace.state is State.ENDED:
        return "ended"
    if not is_final:
        return "silent"
    return "truncated" if last is Outcome.LENGTH else "abandoned"

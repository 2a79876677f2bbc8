"""All accounts of one engine: who is open, who has ended, and which records are due.

Told by the engine's side on its own thread, with `now` of one clock; never blocks, never raises for a request it does
not know. Records go to a sink, a few a step. Bounded by the trace table, which says when a trace is forgotten.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from typing import NamedTuple

from impala_vllm.core.traces import State, Trace
from impala_vllm.core.types import Link, Outcome, RequestId, TraceId
from impala_vllm.insight.ledger.account import Account, Turn
from impala_vllm.insight.ledger.record import VERSION, Phase, Record, Tokens, Unlinked

SETTLED_S = 300.0
"""A trace whose last output asked for nothing counts as finished after this silence. Rewritten histories, the latest
to go on, come within it in five cases of six; those that do go on get a further record."""
ROLL_S = 5.0
"""How often a live trace's record is made anew, at most."""
RECORDS_A_STEP = 8
"""Made at most between two steps: some 100 us."""

Sink = Callable[[Record | Unlinked], bool]
"""Takes a record, or refuses it: then it is made again later."""


class Served(NamedTuple):
    """What a turn took, once it has ended. All zero where vLLM counts nothing of it: it had no token yet."""

    tokens: Tokens
    reusable_tokens: int
    """Leading tokens of its prompt that a cache could have held: full blocks, but for the last token."""
    reads_cache: bool = True


class Book:
    """`run` names this start of the engine; `epoch_s` is the Unix time of the clock's zero."""

    def __init__(self, run: str, epoch_s: float, sink: Sink) -> None:
        self.run = run
        self._epoch_s = epoch_s
        self._sink = sink
        self._turns: dict[str, Turn] = {}
        self._by_turn: dict[RequestId, Turn] = {}
        """Open turns by id: the requests of one `n > 1` request share it."""
        self._accounts: dict[TraceId, Account] = {}
        self._over: dict[TraceId, Account] = {}
        """Forgotten by the table, to be written out."""
        self._quiet: OrderedDict[TraceId, float] = OrderedDict()
        """When the trace's last turn ended, longest ago first."""
        self._due: OrderedDict[TraceId, float] = OrderedDict()
        """When a live record of a changed trace may be made."""
        self._rest = Account(None, 0.0)
        self._rest_due_s = math.inf
        self._num_decoding = 0
        self._decode_s = 0.0
        """What one decoding turn has been charged since the start."""
        self._prefilling: dict[str, Turn] = {}
        self.uncharged_s = 0.0
        """Device seconds of steps in which nobody known was."""

    def __len__(self) -> int:
        return len(self._accounts) + len(self._over)

    def get(self, request_id: str) -> Turn | None:
        """The open turn."""
        return self._turns.get(request_id)

    def prefilling(self) -> dict[str, Turn]:
        """Turns that compute prompt, by request. Not to be changed."""
        return self._prefilling

    def arrive(
        self, request_id: str, turn_id: RequestId, trace: Trace | None, link: Link | None, known_tokens: int, now: float
    ) -> None:
        """A request is about to be queued. `trace` None: a further one of an open turn, or nobody's."""
        sibling = self._by_turn.get(turn_id)
        if trace is not None:
            account = self._accounts.get(trace.trace_id)
            if account is None:
                account = self._accounts[trace.trace_id] = Account(trace, now)
            self._quiet.pop(trace.trace_id, None)
        else:
            account = sibling.account if sibling is not None else self._rest
        turn = Turn(account, request_id, turn_id, now)
        if link is not None:
            turn.known_tokens = known_tokens
            before = account.turns_before.get(link.previous_request_id) if link.previous_request_id else None
            if before is not None:
                turn.follows, turn.previous_tokens = before
        account.enter(now, link.source if link is not None else None, link.confidence if link is not None else 1.0)
        self._turns[request_id] = turn
        if sibling is None:
            self._by_turn[turn_id] = turn
        self._changed(account, now)

    def move(self, turn: Turn, phase: Phase, now: float) -> None:
        """The turn goes on to `phase`, or is in it already."""
        if turn.phase is phase:
            return
        self._charge(turn)
        turn.account.move(turn.phase, phase, now)
        turn.phase = phase
        if phase is Phase.PREFILL:
            self._prefilling[turn.request_id] = turn
        elif phase is Phase.DECODE:
            self._num_decoding += 1
            turn.decode_mark = self._decode_s

    def start(self, turn: Turn, num_computed: int, num_outputs: int, now: float) -> None:
        """The turn runs, with `num_computed` tokens to begin with. Again, where it was preempted."""
        if turn.computed_before:
            turn.account.again.preempted += max(0, turn.computed_before - num_computed)
            turn.computed_before = 0
        turn.outputs_before = num_outputs
        self.move(turn, Phase.PREFILL, now)

    def preempt(self, turn: Turn, num_computed: int, now: float) -> None:
        """The turn lost its place, and `num_computed` tokens."""
        turn.computed_before = num_computed
        turn.account.preemptions += 1
        self.move(turn, Phase.QUEUE, now)

    def step(self, device_s: float, prefill: dict[str, int], num_tokens: int) -> None:
        """A step has taken `device_s`: share it out by tokens, those not in `prefill` alike among who decodes."""
        a_token_s = device_s / num_tokens
        left = num_tokens
        for request_id, tokens in prefill.items():
            self._prefilling[request_id].gpu_s += tokens * a_token_s
            left -= tokens
        if left > 0 and self._num_decoding:
            self._decode_s += left * a_token_s / self._num_decoding
        elif left > 0:
            self.uncharged_s += left * a_token_s

    def finish(self, request_id: str, served: Served, outcome: Outcome, now: float) -> None:
        """The request has ended, however it did."""
        turn = self._turns.pop(request_id, None)
        if turn is None:
            return
        if self._by_turn.get(turn.turn_id) is turn:
            del self._by_turn[turn.turn_id]
        self._charge(turn)
        account, tokens = turn.account, served.tokens
        account.gpu_s += turn.gpu_s
        account.leave(turn.phase, now)
        account.failures += outcome in (Outcome.ABORT, Outcome.ERROR)
        _add(account.tokens, tokens)
        if tokens.prompt:
            self._note_again(turn, served)
        account.note_turn(turn, tokens.prompt, tokens.output, now)
        if account.trace is not None:
            trace_id = account.trace.trace_id
            if trace_id in self._accounts and not account.num_open:
                self._quiet.pop(trace_id, None)
                self._quiet[trace_id] = now
        self._changed(account, now)

    def report(self, trace_id: TraceId, outcome: str, score: float | None, now: float) -> bool:
        """The client says how the trace ended. False: no such trace is known."""
        account = self._accounts.get(trace_id)
        if account is None:
            return False
        account.outcome, account.score, account.is_settled = outcome, score, False
        self._changed(account, now)
        return True

    def forget(self, trace_id: TraceId) -> None:
        """The table has let go of the trace: nothing will be added, but for turns still open."""
        account = self._accounts.pop(trace_id, None)
        self._quiet.pop(trace_id, None)
        self._due.pop(trace_id, None)
        if account is not None and not account.is_settled:
            self._over[trace_id] = account

    def tick(self, now: float) -> None:
        """Make the records that are due, at most `RECORDS_A_STEP`; with nobody open, those of all that changed."""
        left = RECORDS_A_STEP
        if not self._turns:
            now_due, left = math.inf, len(self._accounts) + len(self._over)
        else:
            now_due = now
        if self._rest_due_s < math.inf and now_due >= self._rest_due_s:
            self._write_rest(now)
        for trace_id in list(self._over) if self._over else ():
            if not left:
                return
            account = self._over[trace_id]
            if not account.num_open and self._write(account, True, now):
                del self._over[trace_id]
                left -= 1
        while self._quiet and left:
            trace_id, ended_s = next(iter(self._quiet.items()))
            if now - ended_s < SETTLED_S:
                break
            account = self._accounts[trace_id]
            has_ended = account.trace is not None and account.trace.state is State.ENDED
            is_final = has_ended or account.outcome is not None
            if is_final and not self._write(account, True, now):
                return
            del self._quiet[trace_id]  # in a gap: it goes on, or the table forgets it
            left -= 1
        while self._due and left:
            trace_id, due_s = next(iter(self._due.items()))
            if now_due < due_s or not self._write(self._accounts[trace_id], False, now):
                return
            left -= 1

    def close(self, now: float) -> None:
        """Write what is left, whatever is open."""
        for account in [*self._over.values(), *self._accounts.values()]:
            if not account.is_settled:
                self._write(account, False, now)
        self._write_rest(now)

    def unlinked(self, now: float) -> Unlinked:
        """What requests without a trace took."""
        rest = self._rest
        end = round(self._epoch_s + now, 3)
        return Unlinked(self.run, end, VERSION, rest.turns, copy(rest.tokens), round(rest.gpu_s, 6))

    def _changed(self, account: Account, now: float) -> None:
        if account is self._rest:
            self._rest_due_s = min(self._rest_due_s, now + ROLL_S)
        elif account.trace is not None and account.trace.trace_id in self._accounts:
            self._due.setdefault(account.trace.trace_id, now + ROLL_S)

    def _write(self, account: Account, is_final: bool, now: float) -> bool:
        assert account.trace is not None
        if account.num_open:
            account.settle(now)
        if not self._sink(account.record(self.run, self._epoch_s, is_final)):
            return False
        account.is_settled = is_final
        self._due.pop(account.trace.trace_id, None)
        return True

    def _write_rest(self, now: float) -> None:
        if self._rest.turns and self._sink(self.unlinked(now)):
            self._rest_due_s = math.inf

    def _charge(self, turn: Turn) -> None:
        """The turn leaves its phase: take what it was charged there."""
        if turn.phase is Phase.DECODE:
            self._num_decoding -= 1
            turn.gpu_s += self._decode_s - turn.decode_mark
        elif turn.phase is Phase.PREFILL:
            self._prefilling.pop(turn.request_id, None)

    def _note_again(self, turn: Turn, served: Served) -> None:
        again, tokens = turn.account.again, served.tokens
        known = min(turn.known_tokens, served.reusable_tokens)
        lost = max(0, known - (tokens.prompt - tokens.computed))
        if served.reads_cache:
            again.evicted += lost
        else:
            again.bypassed += lost
        again.rewritten += max(0, min(turn.previous_tokens, served.reusable_tokens) - turn.known_tokens)


def _add(total: Tokens, more: Tokens) -> None:
    total.computed += more.computed
    total.hbm += more.hbm
    total.host += more.host
    total.nvme += more.nvme
    total.other += more.other
    total.output += more.output

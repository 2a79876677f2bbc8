"""A replay's plan as the simulator's workload: the same blocks, lengths and gaps, keys in place of tokens."""

from impala_vllm.core.types import Outcome
from impala_vllm.replay.plan import Plan, PlannedSession, PlannedTurn
from impala_vllm.replay.vocabulary import Vocabulary
from impala_vllm.sim.sessions import Session, Turn, Workload


def workload(plan: Plan, block_size: int, vocabulary: Vocabulary) -> Workload:
    """Same plan, same keys."""
    keys = _Keys(block_size)
    return Workload(block_size, tuple(_session(s, keys, vocabulary) for s in plan.sessions))


class _Keys:
    """Numbers for chained blocks: equal number, equal tokens up to there."""

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._known: dict[tuple[int, tuple[int, ...]], int] = {}

    def of(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        chain: list[int] = []
        above = 0
        for start in range(0, len(tokens) - self._size + 1, self._size):
            block = (above, tokens[start : start + self._size])
            above = self._known.setdefault(block, len(self._known) + 1)
            chain.append(above)
        return tuple(chain)


def _session(session: PlannedSession, keys: _Keys, vocabulary: Vocabulary) -> Session:
    gaps = [t.gap_s for t in session.turns[1:]]
    turns = tuple(
        _turn(t, next_gap, keys, vocabulary) for t, next_gap in zip(session.turns, [*gaps, None], strict=True)
    )
    return Session(
        session.session_id, turns, session.parent_id, session.after_turn, session.start_gap_s, session.arrival_s
    )


def _turn(turn: PlannedTurn, next_gap_s: float | None, keys: _Keys, vocabulary: Vocabulary) -> Turn:
    outcome, tool = Outcome.LENGTH, None
    if turn.output[-1] == vocabulary.eos:
        outcome = Outcome.STOP
        if vocabulary.tool_call in turn.output:
            outcome = Outcome.TOOL_CALL
            tool = ".".join(map(str, turn.output[turn.output.index(vocabulary.tool_call) + 1 : -1]))
    return Turn(
        turn.request_id,
        keys.of(turn.prompt + turn.output),
        len(turn.prompt),
        len(turn.output),
        turn.gap_s,
        turn.joins,
        outcome,
        tool,
        output_limit=len(turn.output),
        next_gap_s=next_gap_s,
    )

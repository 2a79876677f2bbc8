"""Recorded sessions made small enough for the machine at hand, with the prefix structure exact.

Every recorded block becomes a fixed run of tokens, so two prompts share in the replay exactly the
blocks they shared in the recording: stems, continuations, rollbacks, compactions. Where the record
shows that a turn's output became part of a later prompt, that prompt carries the very tokens the
engine was made to emit. Lengths and gaps shrink by the factors of a `Scale`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from impala_vllm.core.types import Outcome
from impala_vllm.replay.plan import Plan, PlannedSession, PlannedTurn
from impala_vllm.replay.vocabulary import Vocabulary
from impala_vllm.workload import Turn


@dataclass(frozen=True, slots=True)
class Scale:
    """How much smaller than life. The defaults are those of the project's baseline."""

    prompt: int = 32
    output: int = 8
    min_output_tokens: int = 4
    max_output_tokens: int = 48
    gap: float = 6.0
    max_gap_s: float = 15.0
    num_turns: int | None = None
    """First turns of each session; None: whole sessions."""
    max_context_tokens: int = 8192
    """Prompt + output of one turn; a session ends before the turn that outgrows it."""

    def describe(self) -> str:
        turns = "whole sessions" if self.num_turns is None else f"first {self.num_turns} turns"
        return (
            f"{turns}, prompts /{self.prompt}, outputs /{self.output} "
            f"({self.min_output_tokens}-{self.max_output_tokens} tokens), gaps /{self.gap:g} "
            f"capped at {self.max_gap_s:g} s"
        )


def lower(turns: Iterable[Turn], scale: Scale, vocabulary: Vocabulary, seed: int = 0) -> Plan:
    """Plan the recorded turns. Same arguments, same plan.

    A turn without a trace id is a session of its own. Children of a session that is cut are kept
    only where the turn that starts them is.
    """
    traces = _by_trace(turns)
    words = _Words(scale, vocabulary, seed)
    sessions: dict[str, PlannedSession] = {}
    num_capped = num_dropped = 0
    for trace_id, recorded in traces.items():
        kept = recorded[: scale.num_turns] if scale.num_turns is not None else recorded
        planned = _fit(words.session(kept), scale.max_context_tokens)
        num_capped += len(planned) < len(kept)
        num_dropped += len(kept) - len(planned)
        if planned:
            first = min(t.arrival_s for t in recorded)
            sessions[trace_id] = PlannedSession(trace_id, tuple(planned), arrival_s=first / scale.gap)
    for trace_id, recorded in traces.items():
        parent_id = recorded[0].parent_trace_id
        if trace_id in sessions and parent_id in traces:
            _attach(sessions, trace_id, recorded, parent_id, traces[parent_id], scale)
    return Plan(tuple(sessions.values()), num_capped, num_dropped)


def _by_trace(turns: Iterable[Turn]) -> dict[str, list[Turn]]:
    traces: dict[str, list[Turn]] = {}
    for turn in turns:
        traces.setdefault(turn.trace_id or turn.request_id, []).append(turn)
    for recorded in traces.values():
        recorded.sort(key=lambda t: t.arrival_s)
    return traces


def _fit(turns: list[PlannedTurn], max_context_tokens: int) -> list[PlannedTurn]:
    for i, turn in enumerate(turns):
        if len(turn.prompt) + len(turn.output) > max_context_tokens:
            return turns[:i]
    return turns


class _Words:
    """Tokens of every recorded block, decided once and then the same in every prompt."""

    def __init__(self, scale: Scale, vocabulary: Vocabulary, seed: int) -> None:
        self._scale = scale
        self._vocabulary = vocabulary
        self._seed = seed
        self._blocks: dict[int, tuple[int, ...]] = {}

    def session(self, recorded: Sequence[Turn]) -> list[PlannedTurn]:
        planned: list[PlannedTurn] = []
        for i, turn in enumerate(recorded):
            prompt = self._prompt(turn)
            output = self._output(turn)
            follower = self._follower(turn, recorded[i + 1 :])
            if follower is not None:
                self._weave(turn, output, follower)
            gap_s = 0.0
            if i:
                before = recorded[i - 1]
                since = before.arrival_s if before.finish_s is None else before.finish_s
                gap_s = scaled_gap(turn.arrival_s - since, self._scale)
            planned.append(PlannedTurn(turn.request_id, prompt, output, gap_s))
        return planned

    def _prompt(self, turn: Turn) -> tuple[int, ...]:
        tokens: list[int] = []
        size, factor = turn.block_size, self._scale.prompt
        for i, block in enumerate(turn.blocks):
            known = self._blocks.get(block)
            if known is None:
                length = (i + 1) * size // factor - i * size // factor
                known = self._blocks[block] = self._vocabulary.text(f"{self._seed}/block/{block}", length)
            tokens += known
        tokens += self._tail(turn)
        return tuple(tokens) or self._vocabulary.text(f"{self._seed}/short/{turn.request_id}", 1)

    def _tail(self, turn: Turn) -> tuple[int, ...]:
        """The prompt's last partial block: equal for equal blocks and length, as in a retry."""
        left = max(0, turn.input_tokens - len(turn.blocks) * turn.block_size)
        # Without a block before it nothing says that two tails are equal.
        key = str(turn.blocks[-1]) if turn.blocks else turn.request_id
        return self._vocabulary.text(f"{self._seed}/tail/{key}", left // self._scale.prompt)

    def _output(self, turn: Turn) -> tuple[int, ...]:
        scale, words = self._scale, self._vocabulary
        length = round((turn.output_tokens or 0) / scale.output)
        length = min(max(length, scale.min_output_tokens), scale.max_output_tokens)
        end: tuple[int, ...] = () if turn.outcome in (Outcome.LENGTH, Outcome.ABORT) else (words.eos,)
        if turn.outcome is Outcome.TOOL_CALL:
            name = words.text(f"{self._seed}/tool/{turn.tool or 'tool'}", 2)
            end = (*(() if words.tool_call is None else (words.tool_call,)), *name, *end)
        end = end[-length:]
        return words.text(f"{self._seed}/output/{turn.request_id}", length - len(end)) + end

    def _follower(self, turn: Turn, later: Sequence[Turn]) -> Turn | None:
        """The next turn whose prompt holds this one's prompt and output, as far as blocks can say.

        A block that some prompt already uses cannot hold a new output, and a prompt that grew by
        less than the output has dropped it (thinking that was stripped, say).
        """
        depth = len(turn.blocks)
        if depth == 0:
            return None
        for other in later:
            if len(other.blocks) > depth and other.blocks[depth - 1] == turn.blocks[-1]:
                grown = other.input_tokens - turn.input_tokens
                if other.blocks[depth] not in self._blocks and grown >= (turn.output_tokens or 0):
                    return other
                return None
        return None

    def _weave(self, turn: Turn, output: tuple[int, ...], follower: Turn) -> None:
        """Give the follower's new blocks the turn's tail and output in place of what they recorded."""
        size, factor = turn.block_size, self._scale.prompt
        end = turn.input_tokens + (turn.output_tokens or 0)
        depth = len(turn.blocks)
        for i in range(depth, min(len(follower.blocks), end // size + 1)):
            block = follower.blocks[i]
            own = max(0, (i + 1) * size - max(i * size, end)) // factor
            tokens = self._vocabulary.text(f"{self._seed}/block/{block}", own)
            self._blocks[block] = (self._tail(turn) + output + tokens) if i == depth else tokens


def scaled_gap(recorded_s: float, scale: Scale) -> float:
    """A recorded gap on the replay's clock; overlapping turns have none."""
    return min(max(recorded_s, 0.0) / scale.gap, scale.max_gap_s)


def _attach(
    sessions: dict[str, PlannedSession],
    child_id: str,
    recorded: Sequence[Turn],
    parent_id: str,
    parent: Sequence[Turn],
    scale: Scale,
) -> None:
    """Hang a child below the turn it followed, and let the turn that waited for it join it."""
    start = recorded[0].arrival_s
    end = max(t.arrival_s if t.finish_s is None else t.finish_s for t in recorded)
    ended = [i for i, t in enumerate(parent) if t.finish_s is not None and t.finish_s <= start]
    after = ended[-1] if ended else -1
    above = sessions.get(parent_id)
    if above is None or after >= len(above.turns):
        del sessions[child_id]
        return
    since = parent[after].finish_s if after >= 0 else parent[0].arrival_s
    child = sessions[child_id]
    start_gap_s = scaled_gap(start - (since or start), scale)
    sessions[child_id] = replace(child, parent_id=parent_id, after_turn=after, start_gap_s=start_gap_s)
    join = next((i for i, t in enumerate(parent) if i > after and t.arrival_s >= end), None)
    if join is None or join >= len(above.turns):
        return
    turn = above.turns[join]
    before = max(end, parent[join - 1].finish_s or 0.0) if join else end
    gap_s = scaled_gap(parent[join].arrival_s - before, scale)
    joined = replace(turn, gap_s=gap_s, joins=(*turn.joins, child_id))
    sessions[parent_id] = replace(above, turns=(*above.turns[:join], joined, *above.turns[join + 1 :]))

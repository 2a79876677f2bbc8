"""Recorded logs as workloads: every session keeps its blocks, lengths, gaps, children and joins.

Where a later prompt shows that a turn's output became part of it, the output's blocks are that prompt's; other
outputs fill blocks that nobody asks for again. Blocks may be merged: the key of a run of blocks is the key of its
last one, because keys are chained.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from statistics import median

from impala_vllm.sim.sessions import Session, Turn, Workload
from impala_vllm.workload import Turn as Recorded
from impala_vllm.workload import WorkloadError

UNKNOWN_OUTPUT_TOKENS = 128
"""Where a log gives no length at all."""
MAX_BLOCKS = 256
"""A prompt of average length is cut into about so many blocks at most: finer ones cost time and change little."""


@dataclass(frozen=True, slots=True)
class Assumed:
    """What a log did not say."""

    output_tokens: int
    """Taken where a turn's output length is missing."""
    num_outputs: int
    """Turns for which it was."""
    num_ends: int
    """Turns that are followed by another one of their session, and whose end is missing."""


def workload(turns: Sequence[Recorded], merge: int | None = None) -> tuple[Workload, Assumed]:
    """Sessions of a log, in order of their first turn. A turn without a trace id is a session of its own.

    `merge` blocks of the log make one; None: as many as keep prompts within `MAX_BLOCKS` on average. Raises
    WorkloadError where the log cannot be simulated.
    """
    if not turns:
        raise WorkloadError("no request in the log; give a log with at least one")
    sizes = {t.block_size for t in turns}
    if len(sizes) > 1:
        raise WorkloadError(f"block sizes {', '.join(map(str, sorted(sizes)))} in one log; give logs of one block size")
    size = sizes.pop()
    merge = merge or _merge(turns, size)
    known = [t.output_tokens for t in turns if t.output_tokens is not None]
    output_tokens = round(median(known)) if known else UNKNOWN_OUTPUT_TOKENS
    traces: dict[str, list[Recorded]] = {}
    for turn in turns:
        traces.setdefault(turn.trace_id or turn.request_id, []).append(turn)
    keys = _Keys(size, merge, max(1, output_tokens))
    sessions: dict[str, Session] = {}
    num_ends = 0
    for trace_id, recorded in traces.items():
        recorded.sort(key=lambda t: t.arrival_s)
        num_ends += sum(t.finish_s is None for t in recorded[:-1])
        sessions[trace_id] = Session(trace_id, tuple(keys.turns(recorded)), arrival_s=recorded[0].arrival_s)
    for trace_id, recorded in traces.items():
        parent_id = recorded[0].parent_trace_id
        if parent_id in traces and parent_id != trace_id:
            _attach(sessions, trace_id, recorded, parent_id, traces[parent_id])
    _cut_loops(sessions)
    assumed = Assumed(output_tokens, len(turns) - len(known), num_ends)
    return Workload(size * merge, tuple(_knowing(sessions)), _has_one_clock(turns, sessions)), assumed


def _merge(turns: Sequence[Recorded], size: int) -> int:
    blocks = sum(t.input_tokens for t in turns) / len(turns) / size
    merge = 1
    while blocks / merge > MAX_BLOCKS:
        merge *= 2
    return merge


class _Keys:
    """Gives outputs their blocks."""

    def __init__(self, size: int, merge: int, unknown_output: int) -> None:
        self._size = size * merge
        self._merge = merge
        self._unknown_output = unknown_output
        self._asked: set[int] = set()
        """Blocks that a prompt already uses cannot hold a new output."""
        self._nobodys = count(-1, -1)

    def turns(self, recorded: Sequence[Recorded]) -> Iterator[Turn]:
        """The turns of one session, in order."""
        prompts = [t.blocks[self._merge - 1 :: self._merge] for t in recorded]
        before: tuple[int, ...] = ()
        for i, (turn, prompt) in enumerate(zip(recorded, prompts, strict=True)):
            self._asked.update(prompt[_shared(before, prompt) :])
            before = prompt
            output_tokens = max(1, self._unknown_output if turn.output_tokens is None else turn.output_tokens)
            prompt_tokens = max(1, turn.input_tokens, len(prompt) * self._size)
            yield Turn(
                request_id=turn.request_id,
                keys=prompt + self._output(recorded, prompts, i, prompt_tokens + output_tokens),
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                gap_s=_gap_s(recorded[i - 1], turn) if i else 0.0,
                outcome=turn.outcome,
                tool=turn.tool,
                namespace=turn.namespace,
                next_gap_s=_gap_s(turn, recorded[i + 1]) if i + 1 < len(recorded) else None,
            )

    def _output(
        self, recorded: Sequence[Recorded], prompts: list[tuple[int, ...]], i: int, num_tokens: int
    ) -> tuple[int, ...]:
        depth, filled = len(prompts[i]), num_tokens // self._size
        if filled <= depth:
            return ()
        turn = recorded[i]
        if turn.output_blocks:
            chain = (turn.blocks + turn.output_blocks)[self._merge - 1 :: self._merge]
            found = chain[depth:filled]
        else:
            follower = self._follower(recorded, prompts, i)
            found = () if follower is None else prompts[follower][depth:filled]
        return found + tuple(next(self._nobodys) for _ in range(filled - depth - len(found)))

    def _follower(self, recorded: Sequence[Recorded], prompts: list[tuple[int, ...]], i: int) -> int | None:
        """The next turn whose prompt holds this one's prompt and output, as far as blocks can say."""
        prompt, turn = prompts[i], recorded[i]
        depth = len(prompt)
        if not depth:
            return None
        for j in range(i + 1, len(recorded)):
            if len(prompts[j]) > depth and prompts[j][depth - 1] == prompt[-1]:
                grown = recorded[j].input_tokens - turn.input_tokens
                is_new = prompts[j][depth] not in self._asked
                return j if is_new and grown >= (turn.output_tokens or 0) else None
        return None


def _shared(before: tuple[int, ...], prompt: tuple[int, ...]) -> int:
    """Leading blocks that both have. Keys are chained: a search, not a walk."""
    low, high = 0, min(len(before), len(prompt))
    while low < high:
        middle = (low + high) // 2
        if before[middle] == prompt[middle]:
            low = middle + 1
        else:
            high = middle
    return low


def _end_s(turn: Recorded) -> float:
    return turn.arrival_s if turn.finish_s is None else turn.finish_s


def _gap_s(before: Recorded, turn: Recorded) -> float:
    """Overlapping turns have none."""
    return max(0.0, turn.arrival_s - _end_s(before))


def _attach(
    sessions: dict[str, Session],
    child_id: str,
    recorded: Sequence[Recorded],
    parent_id: str,
    parent: Sequence[Recorded],
) -> None:
    """Hang a child below the turn it followed, and let the turn that waited for it join it."""
    start_s, end_s = recorded[0].arrival_s, max(map(_end_s, recorded))
    ended = [i for i, t in enumerate(parent) if t.finish_s is not None and t.finish_s <= start_s]
    after = ended[-1] if ended else -1
    since_s = _end_s(parent[after]) if ended else parent[0].arrival_s
    start_gap_s = max(0.0, start_s - since_s)
    sessions[child_id] = replace(sessions[child_id], parent_id=parent_id, after_turn=after, start_gap_s=start_gap_s)
    join = next((i for i, t in enumerate(parent) if i > after and t.arrival_s >= end_s), None)
    if join is None:
        return
    above = sessions[parent_id]
    begin_s = max(end_s, _end_s(parent[join - 1])) if join else end_s
    turns = list(above.turns)
    turns[join] = replace(
        turns[join], gap_s=max(0.0, parent[join].arrival_s - begin_s), joins=(*turns[join].joins, child_id)
    )
    sessions[parent_id] = replace(above, turns=tuple(turns))


def _cut_loops(sessions: dict[str, Session]) -> None:
    """A log may name two traces each other's parent: whoever has no root above becomes one, and nobody joins it."""
    for name, session in list(sessions.items()):
        above, seen = session, {name}
        while above.parent_id is not None and above.parent_id not in seen:
            seen.add(above.parent_id)
            above = sessions[above.parent_id]
        if above.parent_id is not None:
            parent = sessions[session.parent_id or name]
            turns = (replace(t, joins=tuple(j for j in t.joins if j != name)) for t in parent.turns)
            sessions[parent.session_id] = replace(parent, turns=tuple(turns))
            sessions[name] = replace(sessions[name], parent_id=None)


def _knowing(sessions: dict[str, Session]) -> Iterator[Session]:
    """Sessions whose turns know how long it is to the next one, time spent waiting for children included."""
    for session in sessions.values():
        if not any(turn.joins for turn in session.turns):
            yield session
            continue
        turns = list(session.turns)
        for i, turn in enumerate(turns[1:]):
            waits = [sum(t.gap_s for t in sessions[j].turns) + sessions[j].start_gap_s for j in turn.joins]
            if waits:
                turns[i] = replace(turns[i], next_gap_s=turn.gap_s + max(waits))
        yield replace(session, turns=tuple(turns))


def _has_one_clock(turns: Iterable[Recorded], sessions: dict[str, Session]) -> bool:
    """Does any recording hold more than one task?"""
    task: dict[str, str] = {}
    for turn in turns:
        name = turn.trace_id or turn.request_id
        if sessions[name].parent_id is None and task.setdefault(turn.recording, name) != name:
            return True
    return False

"""Sessions of kv-cache-tester (github.com/callanjfox/kv-cache-tester): block ids, no text.

Ids are local to a session. The blocks that hold tool definitions and system prompt are the same for
every session with the same (tool tokens, system tokens, model), so they share one namespace; all
others are the session's own. A sub-agent's requests count their time from its start; its marker stands
where it was done, `duration_ms` later (markers without a duration: where it was launched).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from impala_vllm.core.types import Outcome
from impala_vllm.workload.requests import OUTCOMES
from impala_vllm.workload.source import BAD_JSON, OnError, bad_line, lines, whole
from impala_vllm.workload.turn import Turn


class _Call(msgspec.Struct, tag_field="type"):
    t: float
    hash_ids: list[int]
    input_tokens: int = msgspec.field(name="in")
    output_tokens: int | None = msgspec.field(default=None, name="out")
    model: str = ""
    stop: str = ""
    api_time: float | None = None


class _Plain(_Call, tag="n"):
    pass


class _Streamed(_Call, tag="s"):
    pass


class _Subagent(msgspec.Struct, tag_field="type", tag="subagent"):
    t: float
    agent_id: str
    requests: list[_Plain | _Streamed]
    duration_ms: float | None = None
    tool_tokens: int = 0
    system_tokens: int = 0


class _Session(msgspec.Struct):
    id: str
    block_size: Annotated[int, msgspec.Meta(ge=1)]
    requests: list[_Plain | _Streamed | _Subagent]
    tool_tokens: int = 0
    system_tokens: int = 0


class _Ids:
    """Gives every block of the log its own number."""

    def __init__(self) -> None:
        self._stems: dict[tuple[int, int, int, str, int], int] = {}
        self._next = 0

    def session(self) -> "_SessionIds":
        return _SessionIds(self)

    def fresh(self) -> int:
        self._next += 1
        return self._next

    def stem(self, kind: tuple[int, int, int, str], depth: int) -> int:
        key = (*kind, depth)
        if key not in self._stems:
            self._stems[key] = self.fresh()
        return self._stems[key]


class _SessionIds:
    """Numbers of one session's blocks. Chains repeat each other: only their news are looked up."""

    def __init__(self, ids: _Ids) -> None:
        self._ids = ids
        self._known: dict[tuple[int, str], int] = {}
        self._last: dict[str, tuple[list[int], tuple[int, ...]]] = {}

    def blocks(self, call: _Call, block_size: int, tool_tokens: int, system_tokens: int) -> tuple[int, ...]:
        local = call.hash_ids
        before, numbers = self._last.get(call.model, ([], ()))
        low, high = 0, min(len(local), len(before))
        while low < high:  # ids are chained: equal at one depth means equal up to there
            middle = (low + high) // 2
            if local[middle] == before[middle]:
                low = middle + 1
            else:
                high = middle
        stem = (tool_tokens + system_tokens) // block_size
        kind = (tool_tokens, system_tokens, block_size, call.model)
        news = [self._number(kind, depth, local_id, stem) for depth, local_id in enumerate(local[low:], low)]
        result = numbers[:low] + tuple(news)
        self._last[call.model] = (local, result)
        return result

    def _number(self, kind: tuple[int, int, int, str], depth: int, local_id: int, stem: int) -> int:
        key = (local_id, kind[3])
        number = self._known.get(key)
        if number is None:
            number = self._ids.stem(kind, depth) if depth < stem else self._ids.fresh()
            self._known[key] = number
        return number


def read(paths: list[Path], on_error: OnError) -> Iterator[Turn]:
    """Turns of all sessions, one session after the other; every session's clock starts at zero."""
    ids = _Ids()
    decoder = msgspec.json.Decoder(_Session)
    for file in paths:
        if file.name.removesuffix(".zst").endswith(".json"):  # one session a file, over many lines
            sources = iter([(whole(file), f"{file}:1")])
        else:
            sources = ((line.data, line.where) for line in lines(file))
        for data, where in sources:
            try:
                session = decoder.decode(data)
            except BAD_JSON as e:
                on_error(bad_line(where, e))
                continue
            yield from sorted(_turns(session, ids.session()), key=lambda turn: turn.arrival_s)


def _turns(session: _Session, ids: _SessionIds) -> Iterator[Turn]:
    for number, entry in enumerate(session.requests):
        if isinstance(entry, _Subagent):
            trace = f"{session.id}/{entry.agent_id}"
            start_s = entry.t - (entry.duration_ms or 0.0) / 1000
            for step, call in enumerate(entry.requests):
                blocks = ids.blocks(call, session.block_size, entry.tool_tokens, entry.system_tokens)
                # An agent id may come twice in a session, a marker's place in it cannot.
                yield _turn(session, call, start_s, blocks, f"{trace}.{number}", step, session.id)
        else:
            blocks = ids.blocks(entry, session.block_size, session.tool_tokens, session.system_tokens)
            yield _turn(session, entry, 0.0, blocks, session.id, number, None)


def _turn(
    session: _Session, call: _Call, offset_s: float, blocks: tuple[int, ...], trace: str, step: int, parent: str | None
) -> Turn:
    arrival_s = offset_s + call.t
    return Turn(
        request_id=f"{trace}#{step}",
        arrival_s=arrival_s,
        finish_s=None if call.api_time is None else arrival_s + call.api_time,
        blocks=blocks,
        block_size=session.block_size,
        input_tokens=call.input_tokens,
        output_tokens=call.output_tokens,
        outcome=OUTCOMES.get(call.stop, Outcome.UNKNOWN),
        model=call.model,
        recording=session.id,
        trace_id=trace,
        parent_trace_id=parent,
    )

"""A log as an online reader sees it: arrivals and finishes in order of time, no look-ahead."""

import heapq
from collections.abc import Iterable, Iterator
from itertools import count
from typing import NamedTuple

from impala_vllm.core.types import Arrival, Finish, RequestId
from impala_vllm.workload.turn import Turn


class Event(NamedTuple):
    """Something that happens at `now`; `turn` is the record it comes from."""

    now: float
    fact: Arrival | Finish
    turn: Turn


def events(turns: Iterable[Turn]) -> Iterator[Event]:
    """Splits turns, sorted by arrival, into events; at equal times a finish comes first.

    A turn without `finish_s` ends as it arrives, and its output stays unknown.
    """
    ends: list[tuple[float, int, Turn]] = []
    number = count()
    for turn in turns:
        while ends and ends[0][0] <= turn.arrival_s:
            yield _end(heapq.heappop(ends)[2])
        yield Event(turn.arrival_s, _arrival(turn), turn)
        if turn.finish_s is None:
            yield Event(turn.arrival_s, Finish(RequestId(turn.request_id), turn.blocks, turn.input_tokens), turn)
        else:
            heapq.heappush(ends, (turn.finish_s, next(number), turn))
    while ends:
        yield _end(heapq.heappop(ends)[2])


def _arrival(turn: Turn) -> Arrival:
    return Arrival(
        RequestId(turn.request_id), turn.blocks, turn.input_tokens, turn.namespace, session_id=turn.session_id
    )


def _end(turn: Turn) -> Event:
    blocks = turn.blocks + turn.output_blocks
    tokens = turn.input_tokens + (turn.output_tokens or 0)
    fact = Finish(RequestId(turn.request_id), blocks, tokens, turn.outcome)
    return Event(turn.finish_s or turn.arrival_s, fact, turn)

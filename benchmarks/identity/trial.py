"""One log, one recogniser: its answers scored, its time taken."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from impala_vllm.core.types import Arrival, Finish, Link
from impala_vllm.workload import Recogniser, Turn, links
from impala_vllm.workload.score import Score


@dataclass(frozen=True, slots=True)
class Trial:
    """What one replay came to."""

    variant: str
    score: Score
    num_traces: int
    arrive_us: float
    """Mean time of an arrival."""
    finish_us: float
    """Mean time of an end."""


class _Timed:
    """A recogniser with a stop watch around it."""

    def __init__(self, inner: Recogniser) -> None:
        self._inner = inner
        self.arrive_s = 0.0
        self.finish_s = 0.0

    def arrive(self, arrival: Arrival, now: float) -> Link:
        start = perf_counter()
        link = self._inner.arrive(arrival, now)
        self.arrive_s += perf_counter() - start
        return link

    def finish(self, finish: Finish, now: float) -> None:
        start = perf_counter()
        self._inner.finish(finish, now)
        self.finish_s += perf_counter() - start


def replay(variant: str, recogniser: Recogniser, turns: Sequence[Turn], advance: Callable[[], object]) -> Trial:
    """Replay turns, sorted by arrival, online; `advance` is called after each."""
    timed = _Timed(recogniser)
    score = Score()
    traces: set[str] = set()
    for turn, link in links(turns, timed):
        score.note(turn, link)
        traces.add(link.trace_id)
        advance()
    each_us = 1e6 / len(turns)
    return Trial(variant, score, len(traces), timed.arrive_s * each_us, timed.finish_s * each_us)

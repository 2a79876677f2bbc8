"""What the ledger's book costs the scheduler: a turn from arrival to end, a step with 256 decoding requests.

Bar, with the hooks of observing: 0.5 % of throughput. At 20 turns a second and 15 ms a step that is 5 ms a second. Read
the numbers with `pytest benchmarks/micro --benchmark-enable`; nothing here asserts on time.
"""

from itertools import count

import pytest

from impala_vllm.core.traces import Trace
from impala_vllm.core.types import Link, Namespace, Outcome, RequestId, Source, TraceId
from impala_vllm.insight.ledger.book import Book, Served
from impala_vllm.insight.ledger.record import Phase, Tokens

NUM_TRACES = 2_000
NUM_RUNNING = 256
TOKENS = Tokens(computed=2_000, hbm=30_000, output=200)


class Engine:
    """A book with requests that decode, and traces whose turns come and go."""

    def __init__(self) -> None:
        self.book = Book("bench", 0.0, lambda record: True)
        self.now = 0.0
        self._ids = count()
        self._traces = [Trace(TraceId(f"t{i}"), Namespace(), RequestId("first"), 0.0) for i in range(NUM_TRACES)]
        for i in range(NUM_RUNNING):
            self._begin(i)

    def turn(self) -> None:
        """One turn, from its arrival to its end."""
        self.now += 0.05
        request_id = self._begin(next(self._ids) % (NUM_TRACES - NUM_RUNNING) + NUM_RUNNING)
        self.book.finish(request_id, Served(TOKENS, 31_984), Outcome.STOP, self.now)

    def step(self) -> None:
        """One step in which nobody comes or goes."""
        self.now += 0.015
        self.book.step(0.015, {}, NUM_RUNNING)
        self.book.tick(self.now)

    def _begin(self, number: int) -> str:
        request_id, trace = f"r{next(self._ids)}", self._traces[number]
        link = Link(trace.trace_id, None, Source.CONTINUATION, 0.9, 1_900, None)
        self.book.arrive(request_id, RequestId(request_id), trace, link, 30_400, self.now)
        turn = self.book.get(request_id)
        assert turn is not None
        self.book.start(turn, 30_000, 0, self.now)
        self.book.move(turn, Phase.DECODE, self.now)
        return request_id


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


def test_a_turn_from_its_arrival_to_its_end(benchmark, engine):
    benchmark(engine.turn)


def test_a_step_in_which_nobody_comes_or_goes(benchmark, engine):
    benchmark(engine.step)

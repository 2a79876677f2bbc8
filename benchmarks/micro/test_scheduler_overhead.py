"""What observing costs the scheduler: time of its hooks at 256 running requests and 2,000 known traces.

Bars: 100 us a step, 1 ms for the arrival of a 118k-token prompt (7,375 blocks of 16). Read the numbers with
`pytest benchmarks/micro --benchmark-enable`; nothing here asserts on time.
"""

from itertools import count

import pytest

from impala_vllm.adapters.vllm.observer import Observer
from impala_vllm.adapters.vllm.snapshot import take
from impala_vllm.config import Config
from impala_vllm.core.identity import Identity
from tests.adapters.vllm.fakes import FakeRequest

NUM_TRACES = 2_000
NUM_RUNNING = 256
STEM_BLOCKS = 200
TURN_BLOCKS = 40
LONG_BLOCKS = 7_375

_hashes = count(1)


def fresh(n: int) -> list[bytes]:
    """Block hashes nobody has seen."""
    return [next(_hashes).to_bytes(32, "big") for _ in range(n)]


class Scheduler:
    """What a snapshot reads."""

    pause_state = 0

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def get_request_counts(self) -> tuple[int, int]:
        return NUM_RUNNING, 0

    def get_num_unfinished_requests(self) -> int:
        return NUM_RUNNING


class Fleet:
    """An observer that knows the traces, and their histories to go on with."""

    def __init__(self) -> None:
        self.observer = Observer(Identity(Config().identity))
        stem = fresh(STEM_BLOCKS)
        self.histories = [stem + fresh(TURN_BLOCKS) for _ in range(NUM_TRACES)]
        self._ids = count()
        for i in range(NUM_TRACES):
            request = self.turn(i)
            self.observer.on_arrival(request)
            if i >= NUM_RUNNING:
                self.observer.on_finish(request)

    def turn(self, trace: int) -> FakeRequest:
        """The next request of a trace; it grows by `TURN_BLOCKS`."""
        history = self.histories[trace]
        history += fresh(TURN_BLOCKS)
        return FakeRequest(f"r{next(self._ids)}", list(history), num_prompt_tokens=16 * len(history))


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return Fleet()


def test_a_step_in_which_nobody_comes_or_goes(benchmark, fleet):
    benchmark(fleet.observer.on_step, NUM_RUNNING)


def test_a_step_in_which_a_turn_ends_and_another_begins(benchmark, fleet):
    turns = count(NUM_RUNNING)

    def prepare():
        return (fleet.turn(next(turns) % (NUM_TRACES - NUM_RUNNING) + NUM_RUNNING),), {}

    def step(request: FakeRequest) -> None:
        fleet.observer.on_arrival(request)
        fleet.observer.on_step(NUM_RUNNING)
        fleet.observer.on_finish(request)

    benchmark.pedantic(step, setup=prepare, rounds=500)


def test_the_arrival_of_a_long_prompt_nobody_knows(benchmark, fleet):
    ids = count()

    def prepare():
        return (FakeRequest(f"new{next(ids)}", fresh(LONG_BLOCKS), num_prompt_tokens=16 * LONG_BLOCKS),), {}

    benchmark.pedantic(fleet.observer.on_arrival, setup=prepare, rounds=50)


def test_the_arrival_of_a_long_prompt_that_goes_on(benchmark, fleet):
    history = fresh(LONG_BLOCKS)
    ids = count()

    def prepare():
        history.extend(fresh(TURN_BLOCKS))
        request = FakeRequest(f"long{next(ids)}", list(history), num_prompt_tokens=16 * len(history))
        return (request,), {}

    benchmark.pedantic(fleet.observer.on_arrival, setup=prepare, rounds=50)


@pytest.mark.parametrize("of", [None, "traces", "links"])
def test_a_snapshot_of_the_engine(benchmark, fleet, of):
    page = {"of": of, "limit": 100} if of else None
    benchmark(take, Scheduler(fleet.observer), 0, page)

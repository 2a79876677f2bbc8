"""Time of one identity operation with 2,000 known traces: run with `pytest benchmarks/micro --benchmark-only`.

A prompt of 118,000 tokens is 7,375 blocks of 16, hashes of 32 bytes as the engine makes them.
"""

from hashlib import sha256
from itertools import count
from typing import Any

import pytest

from impala_vllm.core.identity import Identity, IdentityConfig
from impala_vllm.core.types import Arrival, BlockHash, Finish, Outcome, RequestId

NUM_TRACES = 2_000
STEM_BLOCKS = 1_000
KNOWN_BLOCKS = 500
"""Blocks of each known trace past the stem: the time of an operation hardly depends on it, the set-up does."""
LONG_BLOCKS = 118_000 // 16


def blocks(name: str, number: int, stem: list[BlockHash]) -> list[BlockHash]:
    """The stem, then blocks of the name's own."""
    return stem + [sha256(f"{name}{i}".encode()).digest() for i in range(number - len(stem))]


@pytest.fixture(scope="module")
def crowd() -> tuple[Identity, list[BlockHash]]:
    """Identity that knows 2,000 traces with one system prompt, and that prompt."""
    identity = Identity(IdentityConfig())
    stem = blocks("stem", STEM_BLOCKS, [])
    for number in range(NUM_TRACES):
        chain = blocks(f"trace{number}.", STEM_BLOCKS + KNOWN_BLOCKS, stem)
        request = RequestId(f"warm{number}")
        identity.arrive(Arrival(request, chain, len(chain) * 16), number * 0.01)
        identity.finish(Finish(request, chain, len(chain) * 16, Outcome.TOOL_CALL), number * 0.01 + 1)
    return identity, stem


def test_arrival_of_a_new_long_prompt(benchmark: Any, crowd: tuple[Identity, list[BlockHash]]) -> None:
    identity, stem = crowd
    number = count()

    def fresh() -> tuple[tuple[Arrival, float], dict[str, Any]]:
        name = f"new{next(number)}."
        return (Arrival(RequestId(name), blocks(name, LONG_BLOCKS, stem), 118_000), 30.0), {}

    benchmark.pedantic(identity.arrive, setup=fresh, rounds=50)


def test_arrival_of_a_long_follow_up(benchmark: Any, crowd: tuple[Identity, list[BlockHash]]) -> None:
    identity, stem = crowd
    chain = blocks("long", LONG_BLOCKS, stem)
    number = count()

    def follow_up() -> tuple[tuple[Arrival, float], dict[str, Any]]:
        request = RequestId(f"follow{next(number)}")
        chain.extend(sha256(f"{request}.{i}".encode()).digest() for i in range(40))
        previous = RequestId(f"follow{int(request[6:]) - 1}")
        identity.finish(Finish(previous, chain[:-20], 16 * len(chain), Outcome.TOOL_CALL), 40.0)
        return (Arrival(request, list(chain), 16 * len(chain)), 41.0), {}

    benchmark.pedantic(identity.arrive, setup=follow_up, rounds=200)


def test_finish_of_a_long_turn(benchmark: Any, crowd: tuple[Identity, list[BlockHash]]) -> None:
    identity, stem = crowd
    number = count()

    def running() -> tuple[tuple[Finish, float], dict[str, Any]]:
        name = f"end{next(number)}."
        chain = blocks(name, LONG_BLOCKS, stem)
        identity.arrive(Arrival(RequestId(name), chain[:-30], 118_000), 50.0)
        return (Finish(RequestId(name), chain, 118_480, Outcome.TOOL_CALL), 55.0), {}

    benchmark.pedantic(identity.finish, setup=running, rounds=50)


def test_tick_with_nothing_to_expire(benchmark: Any, crowd: tuple[Identity, list[BlockHash]]) -> None:
    identity, _ = crowd
    benchmark(identity.tick, 60.0)

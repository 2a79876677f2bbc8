"""Signatures of tool calls, on token ids as formats lay them out."""

import random

from impala_vllm.core.signature import Signatures

OPENING = [7, 8, 9]
READ, BASH = [20, 21], [30]


def call(name: list[int], rng: random.Random) -> list[int]:
    """What follows the marker: the same opening, the tool's name, arguments of its own."""
    return [*OPENING, *name, 5, *(rng.randrange(100, 5000) for _ in range(20))]


def test_calls_of_one_tool_share_a_signature_that_others_do_not_have() -> None:
    rng, signatures = random.Random(0), Signatures()
    for _ in range(30):
        signatures.of(call(READ, rng))
        signatures.of(call(BASH, rng))
    read = {signatures.of(call(READ, rng)) for _ in range(10)}
    bash = {signatures.of(call(BASH, rng)) for _ in range(10)}
    assert len(read) == len(bash) == 1
    assert read.isdisjoint(bash)


def test_nothing_is_claimed_before_enough_was_seen() -> None:
    rng, signatures = random.Random(0), Signatures(min_seen=6)
    assert [signatures.of(call(READ, rng)) for _ in range(5)] == [None] * 5
    assert signatures.of(call(READ, rng)) is not None
    assert signatures.of([]) is None


def test_what_is_remembered_is_bounded() -> None:
    rng, signatures = random.Random(0), Signatures(max_beginnings=100)
    for _ in range(500):
        signatures.of([rng.randrange(1 << 30) for _ in range(12)])
    assert len(signatures) == 100

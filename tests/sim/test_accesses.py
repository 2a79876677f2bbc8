"""Misses of HBM against Belady's MIN: by hand, against every policy, and never more than any of them has."""

import pytest

from impala_vllm.sim.accesses import Accesses
from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.simulation import Setup, run
from tests.sim.scenes import TIMING
from tests.sim.test_simulation import agents

PINNING = {"continuum", "continuum-dynamic", "infercept", "unbounded"}
"""And one that misses nothing."""


def turns(accesses: Accesses, *chains: str, room: int) -> None:
    """Turns one after the other, each on a pool of `room` blocks of which only what it runs on is in use."""
    for chain in chains:
        keys = [hash_of(chain[: i + 1]) for i in range(len(chain))]
        accesses.looked_up(keys, 0, room)
        accesses.filled(keys, room - len(keys))
        accesses.let_go(keys, room)


def hash_of(prefix: str) -> int:
    return int.from_bytes(prefix.encode(), "big")


def test_min_keeps_what_is_looked_up_next():
    accesses = Accesses()
    turns(accesses, "a", "b", "c", "a", "b", "c", room=2)
    # Least recently used finds nothing. MIN keeps a and gives b up for c, then keeps c.
    assert (accesses.num_looked_up, accesses.num_missed) == (6, 6)
    assert accesses.fewest_missed() == 4


def test_of_a_chain_min_gives_up_the_end_and_what_is_behind_a_hole_is_no_hit():
    accesses = Accesses()
    turns(accesses, "abcd", "x", "abcd", "x", room=4)
    # x takes the place of d; all four take that of x while they run.
    assert accesses.fewest_missed() == 4 + 1 + 1 + 1
    accesses = Accesses()
    turns(accesses, "abcd", "xyz", "abcd", room=4)
    assert accesses.fewest_missed() == 4 + 3 + 3, "only a is left beside xyz"
    accesses = Accesses()
    turns(accesses, "abc", "ayz", "abc", room=4)
    assert accesses.fewest_missed() == 3 + 2 + 1, "a is shared, b is kept, c goes"


def test_what_runs_is_there_and_takes_its_room():
    accesses = Accesses()
    a, b = hash_of("a"), hash_of("b")
    accesses.looked_up([a], 0, 2)
    accesses.filled([a], 1)
    accesses.let_go([a], 2)
    accesses.looked_up([b], 0, 2)
    accesses.filled([b], 0)  # b runs and something else does: no room for a
    accesses.looked_up([b], 1, 0)
    accesses.let_go([b], 0)
    accesses.let_go([b], 2)
    accesses.looked_up([a], 0, 2)
    assert accesses.fewest_missed() == 3


def test_what_is_still_being_computed_is_no_hit():
    accesses = Accesses()
    stem = [hash_of("s")]
    accesses.looked_up(stem, 0, 9)
    accesses.looked_up(stem, 0, 9)
    accesses.filled(stem, 8)
    assert accesses.fewest_missed() == 2


@pytest.mark.parametrize("name", [n for n in KINDS if n not in PINNING])
@pytest.mark.parametrize("hbm_tokens", [140, 200, 400])
def test_nobody_misses_less_than_min(name, hbm_tokens):
    misses = run(agents(), Setup(TIMING, hbm_tokens), KINDS[name], counts_misses=True).misses
    assert misses is not None
    assert misses.num_fewest <= misses.num_missed <= misses.num_looked_up


def test_with_room_for_all_there_is_nothing_to_choose():
    misses = run(agents(), Setup(TIMING, 4000), KINDS["impala"], counts_misses=True).misses
    assert misses is not None
    assert misses.num_missed == misses.num_fewest > 0


def test_they_are_counted_on_hbm_alone_and_where_asked_for():
    assert run(agents(), Setup(TIMING, 200, host_tokens=200), KINDS["stock"], counts_misses=True).misses is None
    assert run(agents(), Setup(TIMING, 200), KINDS["stock"]).misses is None

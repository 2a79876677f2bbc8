"""Whole runs: deterministic, complete, and in the order that must hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from impala_vllm.config import ConfigError
from impala_vllm.sim.policies import KINDS, pick
from impala_vllm.sim.simulation import Arrivals, Setup, choose, run
from tests.sim.scenes import TIMING, session, workload


def agents(count=8, turns=6):
    """Sessions that grow, with tool times of their own."""
    names = [f"s{i}-" for i in range(count)]
    return workload(
        *(
            session(n, [24 + 12 * t + i for t in range(turns)], output=6, gap_s=2.0 + 3.0 * i, stem=8)
            for i, n in enumerate(names)
        )
    )


@pytest.mark.parametrize("name", KINDS)
def test_the_same_arguments_give_the_same_run_to_the_bit(name):
    setup = Setup(TIMING, hbm_tokens=200)
    first, second = (run(agents(), setup, KINDS[name]) for _ in range(2))
    assert first == second


ALL_KINDS = """
from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.simulation import Setup, run
from tests.sim.scenes import TIMING
from tests.sim.test_simulation import agents
for kind in KINDS.values():
    for setup in (Setup(TIMING, 200), Setup(TIMING, 200, 2, host_tokens=200, nvme_tokens=800, router="impala")):
        print(kind.name, run(agents(4), setup, kind))
"""


def test_the_seed_of_hashes_changes_no_bit():
    found: list[str] = []
    for seed in "12":
        done = subprocess.run(
            [sys.executable, "-c", ALL_KINDS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(done.stdout)
    assert found[0] == found[1]
    assert found[0].count("Measures(") == 2 * len(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_with_room_for_all_nobody_computes_anything_twice(name):
    found = run(agents(), Setup(TIMING, hbm_tokens=4000), KINDS[name])
    assert found.measures.recomputed_tokens == 0
    assert found.measures.hit_ratio == run(agents(), Setup(TIMING, 200), KINDS["unbounded"]).measures.hit_ratio


def test_an_endless_cache_computes_what_the_workload_says_is_new():
    load = agents(count=3)
    found = run(load, Setup(TIMING, 200, arrivals=Arrivals(spread_s=3.0)), KINDS["unbounded"])
    assert found.computed_tokens == load.new_tokens()


def test_every_replica_works_and_a_session_stays_where_it_began():
    found = run(agents(), Setup(TIMING, hbm_tokens=4000, num_replicas=2), KINDS["stock"])
    alone = run(agents(), Setup(TIMING, hbm_tokens=4000), KINDS["stock"])
    assert found.measures.makespan_s < alone.measures.makespan_s
    lost = alone.measures.hit_ratio - found.measures.hit_ratio
    assert 0 <= lost < 0.05  # the stem, once more


def test_so_many_are_live_at_a_time():
    found = run(agents(), Setup(TIMING, 4000, arrivals=Arrivals(num_live=1)), KINDS["stock"])
    ends = [s.end_s for s in found.served if s.index == 5]
    starts = [s.start_s for s in found.served if s.index == 0]
    assert sorted(starts)[1:] == sorted(ends)[:-1]


def test_a_choice_is_seeded():
    load = agents()
    assert choose(load, 3, 0) == choose(load, 3, 0) != choose(load, 3, 1)
    assert len(choose(load, None, 0).roots()) == len(load.roots())
    assert len(choose(load, 99, 0).roots()) == len(load.roots())


def test_policies_are_picked_by_name():
    assert [k.name for k in pick("impala, stock,impala")] == ["impala", "stock"]
    assert pick("all") == list(KINDS.values())
    for wrong in ("nothing-like-it", ""):
        with pytest.raises(ConfigError, match="choose from"):
            pick(wrong)

"""Fleets in virtual time: every way to choose serves all turns, at the same sessions."""

from random import Random

import msgspec
import pytest

from benchmarks.fleet import sessions
from benchmarks.fleet.engines import ARMS, Fleet
from impala_vllm.sim.timing import DEFAULT, load

TIMING = msgspec.structs.replace(load(DEFAULT), hbm_tokens=30_000)


def run(arm: str, restarts: float = 0.0, seed: int = 0):
    lot = Random(seed)
    asked = sessions.agents(16, 4, lot)
    fleet = Fleet(arm, asked, 8, TIMING, Random(seed))
    return fleet, asked, fleet.run([lot.uniform(0.0, 3.0) for _ in asked], restarts)


@pytest.mark.parametrize("arm", ARMS)
def test_all_turns_are_served_and_nothing_is_left_running(arm):
    fleet, asked, result = run(arm)
    assert fleet.prompt_tokens == sum(step.num_tokens for steps in asked for step in steps)
    assert 0.0 <= result.hit_ratio < 1.0
    assert result.spread >= 1.0
    assert fleet.running == [0] * 8
    assert run(arm)[2] == result  # the same seed, the same run


def test_agents_are_spread_as_evenly_as_the_goal_says():
    spreads = sorted(run("impala", seed=seed)[2].spread for seed in range(5))
    assert spreads[2] <= 1.4  # 1.3 at 16 servers; fewer make it coarser
    assert spreads[2] < sorted(run("sticky", seed=seed)[2].spread for seed in range(5))[2]


def test_copies_of_a_session_share_nothing():
    pool = sessions.agents(3, 2, Random(0))
    drawn = sessions.chosen(pool, 6, Random(1))
    assert not {k for s in drawn[:3] for k in s[-1].keys} & {k for s in drawn[3:] for k in s[-1].keys}

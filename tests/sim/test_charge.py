"""What deciding costs makes steps longer, and only where it is asked for."""

from dataclasses import replace

import pytest
from msgspec import structs

from impala_vllm.sim.charge import MEASURED, Charge
from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.simulation import Arrivals, Setup, run
from tests.sim.scenes import TIMING, session, workload
from tests.sim.test_simulation import agents

ALONE = workload(session("a", [8, 16], output=3, gap_s=10.0))
"""8 tokens, two decodes; then 7 found in two blocks of 4 and 8 new ones, two decodes: six steps."""


def busy_s(setup: Setup) -> float:
    return run(ALONE, setup, KINDS["stock"]).busy_s


def test_every_step_is_longer_by_what_it_is_charged():
    setup = Setup(TIMING, 400)
    assert busy_s(replace(setup, charge=Charge(step_s=0.5))) == pytest.approx(busy_s(setup) + 6 * 0.5)


def test_tiers_are_paid_by_the_token_where_there_are_any():
    charge = Charge(new_token_s=0.5, found_token_s=0.25)
    assert busy_s(Setup(TIMING, 400, charge=charge)) == busy_s(Setup(TIMING, 400))
    setup = Setup(TIMING, 400, host_tokens=400)
    assert busy_s(replace(setup, charge=charge)) == pytest.approx(busy_s(setup) + (8 + 8) * 0.5 + 8 * 0.25)


def test_steps_with_turns_waiting_are_charged_for_ranking_them():
    load = workload(session("a", [8], output=3), session("b", [8], output=1))
    timing = structs.replace(TIMING, max_num_seqs=1)
    setup = Setup(timing, 400, arrivals=Arrivals(spread_s=0.0))
    free = run(load, setup, KINDS["stock"]).busy_s
    charged = run(load, replace(setup, charge=Charge(waiting_step_s=0.5)), KINDS["stock"]).busy_s
    assert charged - free == pytest.approx(3 * 0.5), "b waits while a has its steps"


def test_what_was_measured_is_little_beside_the_steps_of_a_gpu():
    assert MEASURED.step(0, 0, False, False) < 1e-5
    assert MEASURED.step(2048, 0, True, True) < 2e-3


def test_a_charge_changes_no_run_that_has_none():
    setup = Setup(TIMING, hbm_tokens=200)
    assert run(agents(), setup, KINDS["impala"]) == run(agents(), replace(setup, charge=Charge()), KINDS["impala"])

"""The rivals' fidelity: figures that can be tried, loads that are the same twice, a verdict that can fail."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from click.testing import CliRunner

from benchmarks.sim import papers
from benchmarks.sim.gains import sustained, token_s
from benchmarks.sim.papers import BATCH, CODING, FIGURES, Figure
from benchmarks.sim.programs import Agents, Workflow, forgetting
from impala_vllm.sim import timing
from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.simulation import Setup, run
from tests.sim.scenes import TIMING, session, workload

TIMING_OF_A_GPU = timing.load(timing.DEFAULT)
SMALL = replace(CODING, num_programs=4, turns=(2, 3))


def figure(low: float, policy: str = "continuum") -> Figure:
    return Figure(policy, f"{low:g}x something", low, 2 * low, SMALL, 60_000, papers.faster)


def test_every_figure_is_of_a_policy_that_is_here_and_every_rival_but_stock_has_one():
    tried = {f.policy for f in FIGURES}
    assert tried <= set(KINDS)
    assert {name for name, kind in KINDS.items() if not kind.is_bound} - {"stock", "impala"} <= tried


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f.policy)
def test_the_least_that_counts_is_what_the_paper_publishes_and_not_what_is_found_here(figure):
    assert 1.0 < figure.low <= figure.high
    published = [float(n) for n in re.findall(r"(\d+(?:\.\d+)?)(?=x|-\d)", figure.says)]
    assert (min(published), max(published)) == (figure.low, figure.high)


@pytest.mark.parametrize(("gain", "is_good"), [(0.9, False), (1.0, False), (1.4, False), (1.42, True), (9.0, True)])
def test_a_gain_counts_from_the_square_root_of_the_papers_least(gain, is_good):
    assert figure(2.0).is_reproduced(gain) is is_good


@pytest.mark.parametrize("load", [SMALL, BATCH, replace(papers.TAILED, num_programs=20)])
def test_a_load_is_the_same_for_the_same_seed(load: Agents):
    first, again, other = load.make(3), load.make(3), load.make(4)
    assert first == again != other
    assert len(first.sessions) == load.num_programs
    assert all(low <= high for low, high in [load.turns])
    assert all(1 <= len(s.turns) <= load.turns[1] for s in first.sessions)


def test_programs_grow_by_what_they_were_told_and_share_nothing():
    load = SMALL.make(0)
    for program in load.sessions:
        for before, turn in zip(program.turns, program.turns[1:], strict=False):
            assert turn.keys[: len(before.keys)] == before.keys
            assert turn.prompt_tokens > before.num_tokens
            assert turn.gap_s == before.next_gap_s
        assert program.turns[-1].next_gap_s is None
    keys = [set(s.turns[-1].keys) for s in load.sessions]
    assert sum(map(len, keys)) == len(set.union(*keys))


def test_a_server_without_a_prefix_cache_finds_nothing():
    keys = [key for turn in forgetting(SMALL.make(0)).turns() for key in turn.keys]
    assert len(keys) == len(set(keys))


def test_agents_of_a_workflow_take_turns_and_come_back_to_their_prompt_only():
    flow = Workflow(3, 4, fixed_tokens=1024, fresh_tokens=256, output_tokens=8, step_s=4.0)
    load = flow.make(0)
    assert load == flow.make(0) != flow.make(1)
    for agent in load.sessions:
        first, *others = agent.turns
        assert all(turn.keys[:8] == first.keys[:8] for turn in others)
        assert len({turn.keys[8] for turn in agent.turns}) == 4
    # Each turn is over before the next agent's begins: nobody waits for another, whatever the policy.
    served = sorted(run(load, Setup(TIMING_OF_A_GPU, 2048), KINDS["stock"]).served, key=lambda s: s.start_s)
    assert all(a.end_s < b.start_s for a, b in pairwise(served))
    assert [s.session_id for s in served] == ["a0", "a1", "a2"] * 4


def test_latency_by_token_weighs_programs_alike():
    load = workload(session("short", [8], output=1), session("long", [8], output=5))
    found = run(load, Setup(TIMING, 400), KINDS["stock"])
    # Starts lie 15 s apart. Short: 5 s for a token. Long: 5 + 4 x 1.25 s for five.
    assert token_s(found) == pytest.approx((5.0 / 1 + 10.0 / 5) / 2)


def test_what_is_sustained_is_where_latency_passes_its_limit_first():
    rates = (1.0, 2.0, 4.0, 8.0)
    assert sustained(lambda rate: rate, 3.0, rates) == pytest.approx(3.0)
    assert sustained(lambda rate: {1.0: 1.0, 2.0: 5.0, 4.0: 2.0, 8.0: 2.0}[rate], 3.0, rates) < 2.0
    assert sustained(lambda rate: 1.0, 3.0, rates) == 8.0


def test_the_verdict_of_all_figures_is_the_exit_code(monkeypatch):
    for low, code in ((1.0001, 0), (1e9, 1)):
        monkeypatch.setattr(papers, "FIGURES", (figure(low, "infercept"),))
        monkeypatch.setattr(papers, "_gain", lambda figure, seed: 1.2 + 0.1 * seed)
        result = CliRunner().invoke(papers.main, ["--seeds", "2", "--no-record"])
        assert result.exit_code == code, result.output
        assert ("not reproduced" in result.output) is bool(code)
        assert "1.25x" in result.output


def test_a_small_figure_is_tried_on_the_real_simulator():
    gain = papers._gain(figure(1.1, "concur"), 0)
    assert gain == papers._gain(figure(1.1, "concur"), 0)
    assert 0.2 < gain < 5.0

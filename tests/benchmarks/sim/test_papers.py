"""The rivals' fidelity: figures that can be tried, loads that are the same twice, a verdict that can fail."""

from dataclasses import replace

import pytest
from click.testing import CliRunner

from benchmarks.sim import papers
from benchmarks.sim.papers import BATCH, CODING, FIGURES, Figure, Load
from impala_vllm.sim.policies import KINDS

SMALL = replace(CODING, num_programs=4, turns=(2, 3))


def figure(low: float, policy: str = "continuum") -> Figure:
    return Figure(policy, f"{low:g}x something", low, 2 * low, SMALL, 60_000, papers.faster)


def test_every_figure_is_of_a_policy_that_is_here_and_every_rival_but_stock_has_one():
    tried = {f.policy for f in FIGURES}
    assert tried <= set(KINDS)
    assert {name for name, kind in KINDS.items() if not kind.is_bound} - {"stock", "impala"} <= tried
    assert all(1.0 < f.low <= f.high for f in FIGURES)


@pytest.mark.parametrize(("gain", "is_good"), [(0.9, False), (1.0, False), (1.4, False), (1.42, True), (9.0, True)])
def test_a_gain_counts_from_the_square_root_of_the_papers_least(gain, is_good):
    assert figure(2.0).is_reproduced(gain) is is_good


@pytest.mark.parametrize("load", [SMALL, BATCH, replace(papers.TAILED, num_programs=20)])
def test_a_load_is_the_same_for_the_same_seed(load: Load):
    first, again, other = load.make(3), load.make(3), load.make(4)
    assert first == again != other
    assert len(first.sessions) == load.num_programs
    assert all(low <= high for low, high in [load.turns])
    assert all(1 <= len(s.turns) <= load.turns[1] for s in first.sessions)


def test_programs_grow_by_what_they_were_told_and_share_nothing():
    load = SMALL.make(0)
    for session in load.sessions:
        for before, turn in zip(session.turns, session.turns[1:], strict=False):
            assert turn.keys[: len(before.keys)] == before.keys
            assert turn.prompt_tokens > before.num_tokens
            assert turn.gap_s == before.next_gap_s
        assert session.turns[-1].next_gap_s is None
    keys = [set(s.turns[-1].keys) for s in load.sessions]
    assert sum(map(len, keys)) == len(set.union(*keys))


def test_a_server_without_a_prefix_cache_finds_nothing():
    forgetting = papers._forgetting(SMALL.make(0))
    keys = [key for turn in forgetting.turns() for key in turn.keys]
    assert len(keys) == len(set(keys))


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

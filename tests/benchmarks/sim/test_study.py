"""The study of policies: what is run at a point, and who is said to win there."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from click.testing import CliRunner

pytest.importorskip("matplotlib")

from benchmarks.sim import heat, loads, study
from benchmarks.sim.study import Point, judge
from impala_vllm.sim import timing
from impala_vllm.sim.measures import Measures

SESSIONS = Path(__file__).parents[2] / "data" / "sessions.weka.jsonl.zst"
POINT = Point("agents", 4.0, "host 1x, NVMe 8x", "slow links")


def measures(stall_s: float, tasks_per_hour: float = 10.0) -> Measures:
    return Measures(stall_s, stall_s, stall_s, stall_s, stall_s, 1.0, tasks_per_hour, 0.5, 0, None, None, 0, 0.0)


def verdict(impala: tuple[float, float], **others: tuple[float, float]):
    found = {name: [measures(*figures)] for name, figures in {"impala": impala, **others}.items()}
    return judge(POINT, found)


def test_impala_wins_with_less_stall_and_as_many_tasks():
    found = verdict((50, 10), stock=(100, 10), plas=(80, 9), unbounded=(10, 20))
    assert found.wins
    assert found.best == "plas"
    assert found.stall == [pytest.approx(50 / 80)]
    assert found.to_bound == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("impala", "wins"), [((81.5, 9.95), True), ((82, 9.95), False), ((70, 9.8), False), ((81.5, 9.8), False)]
)
def test_within_two_per_cent_of_stall_and_one_of_tasks_it_is_as_good(impala, wins):
    assert verdict(impala, stock=(80, 10)).wins is wins


def test_tasks_are_held_against_whoever_has_most():
    found = verdict((50, 10), plas=(80, 9), stock=(100, 11))
    assert found.best == "plas"
    assert found.tasks == [pytest.approx(10 / 11)]
    assert not found.wins


def test_a_bound_is_no_rival():
    assert verdict((50, 10), stock=(100, 10), belady=(1, 99), **{"impala-oracle": (1, 99)}).best == "stock"


def test_a_rival_that_holds_turns_for_longer_than_clients_wait_is_said_to():
    patient = replace(measures(80), max_hold_s=1240.0)
    found = judge(POINT, {"impala": [measures(100)], "thunderagent": [patient]})
    assert (found.held_s, found.best_held_s) == (0.0, 1240.0)
    assert "thunderagent holds a turn for 1,240 s" in study._line(found)
    assert "holds" not in study._line(judge(POINT, {"impala": [measures(100)], "plas": [measures(80)]}))


def test_stalls_of_nothing_are_alike():
    assert verdict((0.009, 10), stock=(0.001, 10)).wins


def test_the_machine_of_a_point_has_its_shares_and_its_links():
    engine = timing.load(timing.DEFAULT)
    load = loads.labelling(40, Random(0))
    made = study.setup(load, engine, replace(POINT, level=0.5))
    assert made.hbm_tokens == round(2 * load.working_set_tokens())
    assert (made.host_tokens, made.nvme_tokens) == (made.hbm_tokens, 8 * made.hbm_tokens)
    assert made.timing.host_bytes_per_s == pytest.approx(engine.host_bytes_per_s / 3)
    tight = study.setup(load, engine, replace(POINT, level=1e6, links="GPU links"))
    assert tight.hbm_tokens == load.longest_tokens() + 2 * load.block_size
    assert tight.timing.host_bytes_per_s == engine.host_bytes_per_s


def test_a_labelling_job_shares_its_instructions_and_nothing_else():
    load = loads.labelling(10, Random(0))
    stem = loads.STEM_TOKENS // loads.BLOCK
    assert len({s.turns[0].keys[:stem] for s in load.sessions}) == 1
    own = [key for s in load.sessions for key in s.turns[0].keys[stem:]]
    assert len(own) == len(set(own))


def test_short_sessions_keep_what_their_last_turn_needs_to_know():
    logs = loads.read(SESSIONS, None)
    made = logs.make("agents", 4, 3, seed=0)
    assert made == logs.make("agents", 4, 3, seed=0)
    assert all(len(s.turns) <= 3 for s in made.sessions)
    assert all(s.turns[-1].next_gap_s is None for s in made.sessions)
    assert logs.names() == ("agents", "labelling")


def test_a_corner_is_run_and_drawn(tmp_path):
    page = tmp_path / "heat.html"
    arguments = ["--traces", str(SESSIONS), "--tasks", "3", "--turns", "2", "--workload", "agents", "--quick"]
    result = CliRunner().invoke(
        study.main, [*arguments, "--policies", "stock,impala,unbounded", "--no-record", "--html", str(page)]
    )
    assert result.exit_code in (0, 1), result.output
    assert ("not won" in result.output) is bool(result.exit_code)
    assert "agents 4x, host 1x" in result.output
    assert page.read_text().count("<img") == 1


def test_quick_keeps_the_load_that_was_asked_for():
    arguments = ["--traces", str(SESSIONS), "--tasks", "3", "--turns", "2", "--workload", "agents", "--quick"]
    more = ["--oversubscription", "2", "--policies", "stock,impala", "--no-record"]
    output = CliRunner().invoke(study.main, [*arguments, *more]).output
    assert "agents 2x, HBM" in output
    assert "agents 4x" not in output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--workload", "agnets"], "agnets"),
        (["--workload", "mix"], "mix"),
        (["--policies", "stock,impala,plass"], "plass"),
        (["--policies", "impala"], "rival"),
        (["--policies", "stock,belady"], "impala"),
    ],
)
def test_what_is_not_there_is_one_line_and_exit_2(arguments, named):
    result = CliRunner().invoke(study.main, ["--traces", str(SESSIONS), "--quick", "--no-record", *arguments])
    assert result.exit_code == 2
    assert named in result.output
    assert result.output.count("\n") == 1


def test_a_log_that_is_none_is_one_line_and_exit_2(tmp_path):
    result = CliRunner().invoke(study.main, ["--traces", str(tmp_path / "none"), "--no-record"])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1


def test_names_in_the_page_are_escaped():
    found = {Point("<b>", 1.0, "HBM", ""): {"impala": [measures(1)], "stock": [measures(2)]}}
    text = heat.page(found, "<i>")
    assert "&lt;b&gt;" in text
    assert "<i>" not in text

"""The study of policies: what is run at a point, and who is said to win there."""

from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from click.testing import CliRunner

pytest.importorskip("matplotlib")

from benchmarks import record, targets
from benchmarks.sim import cells, grid, heat, loads, study, tables
from benchmarks.sim.cells import PAYING, Cell, Ran
from benchmarks.sim.grid import Point
from benchmarks.sim.raw import Raw
from benchmarks.sim.verdict import judge
from impala_vllm.config import ConfigError
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
    assert "thunderagent holds a turn for 1,240 s" in tables.line(found)
    assert "holds" not in tables.line(judge(POINT, {"impala": [measures(100)], "plas": [measures(80)]}))


def test_stalls_of_nothing_are_alike():
    assert verdict((0.009, 10), stock=(0.001, 10)).wins


def test_the_machine_of_a_point_has_its_shares_and_its_links():
    engine = timing.load(timing.DEFAULT)
    load = loads.labelling(40, Random(0))
    made = grid.setup(load, engine, replace(POINT, level=0.5))
    assert made.hbm_tokens == round(2 * load.working_set_tokens())
    assert (made.host_tokens, made.nvme_tokens) == (made.hbm_tokens, 8 * made.hbm_tokens)
    assert made.timing.host_bytes_per_s == pytest.approx(engine.host_bytes_per_s / 3)
    tight = grid.setup(load, engine, replace(POINT, level=1e6, links="GPU links"))
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
    assert loads.names(False) == ("agents", "labelling")


CORNER = ["--traces", str(SESSIONS), "--tasks", "3", "--turns", "2", "--workload", "agents", "--quick"]
ONE = [*CORNER, "--oversubscription", "4", "--policies", "stock,impala,unbounded", "--no-record", "--processes", "1"]


def invoke(*arguments: str):
    return CliRunner().invoke(study.main, list(arguments))


def test_a_corner_is_run_and_drawn(tmp_path):
    page = tmp_path / "heat.html"
    few = ["--policies", "stock,impala,unbounded", "--processes", "1", "--no-record"]
    result = invoke(*CORNER, *few, "--html", str(page))
    assert result.exit_code in (0, 1), result.output
    assert ("not won" in result.output) is bool(result.exit_code)
    assert "agents 4x, host 1x" in result.output
    assert page.read_text().count("<img") == 1


def test_quick_keeps_the_load_that_was_asked_for():
    output = invoke(*ONE).output
    assert "agents 4x, HBM" in output
    assert "agents 1x" not in output


def test_what_is_kept_is_not_run_again(tmp_path, monkeypatch):
    raw = tmp_path / "runs.jsonl"
    first = invoke(*ONE, "--raw", str(raw))
    lines = raw.read_text().splitlines()
    assert len(lines) == 1 + 3 * 2 + 1, "stock and impala at three points, unbounded once"
    assert sum('"missed": null' not in line for line in lines[1:]) == 1, "impala's on HBM alone"
    assert "misses" in first.output
    raw.write_text("\n".join(lines[:4]) + "\n" + lines[4][:20])  # as after a crash
    ran = []
    monkeypatch.setattr(cells.Bench, "run", _noting(cells.Bench.run, ran))
    again = invoke(*ONE, "--raw", str(raw))
    assert len(ran) == 4
    assert sorted(raw.read_text().splitlines()) == sorted(lines)
    assert again.output.split("impala / best rival")[1] == first.output.split("impala / best rival")[1]
    assert "3 of 7 runs are there already" in again.output


def _noting(run, ran):
    def noting(self, cell):
        ran.append(cell)
        return run(self, cell)

    return noting


def test_a_study_that_is_stopped_keeps_what_it_has(tmp_path, monkeypatch):
    raw, run = tmp_path / "runs.jsonl", cells.Bench.run

    def stopping(self, cell):
        if cell.policy == "unbounded":
            raise KeyboardInterrupt
        return run(self, cell)

    monkeypatch.setattr(cells.Bench, "run", stopping)
    result = invoke(*ONE, "--raw", str(raw))
    assert result.exit_code == 130
    assert str(raw) in result.output.replace("\n", "")
    assert len(raw.read_text().splitlines()) == 1 + 2


def test_a_process_that_is_killed_ends_the_study_with_a_line(tmp_path, monkeypatch):
    def breaking(self, cell):
        raise BrokenProcessPool

    monkeypatch.setattr(cells.Bench, "run", breaking)
    result = invoke(*ONE, "--raw", str(tmp_path / "runs.jsonl"))
    assert result.exit_code == 2
    assert "the same command goes on" in result.output


def test_two_processes_find_what_one_finds(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert invoke(*ONE, "--raw", str(one)).exit_code in (0, 1)
    assert invoke(*ONE[:-1], "2", "--raw", str(two)).exit_code in (0, 1)
    assert sorted(one.read_text().splitlines()) == sorted(two.read_text().splitlines())


def test_runs_of_another_study_are_not_taken_for_this_ones(tmp_path):
    raw = tmp_path / "runs.jsonl"
    assert Raw(raw, {"tasks": 3}).found == {}
    with pytest.raises(ConfigError, match="tasks 3 and not 4"):
        Raw(raw, {"tasks": 4})
    raw.write_text("{}\n")
    with pytest.raises(ConfigError, match="no file of the study"):
        Raw(raw, {"tasks": 3})


def test_what_is_kept_is_read_as_it_was(tmp_path):
    raw = tmp_path / "runs.jsonl"
    ran = Ran(Cell("agents", None, None, None, "unbounded", 2), 3.5, measures(1.25))
    counted = Ran(Cell("agents", 4.0, "HBM", "GPU links", "impala", 0), 3.5, measures(1.25), 7, 5)
    for one in (ran, counted):
        Raw(raw, {}).add(one)
    assert Raw(raw, {}).found == {ran.cell: ran, counted.cell: counted}


def test_the_grid_of_an_hour_has_every_axis_and_fewer_points():
    hour, full = (grid.points(kind, ("agents", "mix")) for kind in ("hour", "full"))
    assert (len(hour), len(full)) == (42, 70)
    assert set(hour) < set(full)
    for axis in ("workload", "level", "tiers", "links"):
        assert {getattr(p, axis) for p in hour} == {getattr(p, axis) for p in full}
    assert {p.links for p in hour if p.level == 4.0} == set(grid.LINKS)


def test_hbm_for_everything_is_run_once_a_seed_and_bounds_once_a_point():
    points = grid.points("full", ["agents"])
    made = cells.cells(points, ["impala", "belady", "unbounded"], 3)
    by_policy = {n: sum(c.policy == n for c in made) for n in ("impala", "belady", "unbounded")}
    assert by_policy == {"impala": 105, "belady": 35, "unbounded": 3}


def test_a_level_that_the_longest_turn_forbids_is_said():
    found = judge(POINT, {"impala": [measures(1)], "stock": [measures(2)]}, level=2.5)
    assert "agents 4x, host 1x, NVMe 8x, slow links (in fact 2.5x)" in tables.line(found)
    assert "in fact" not in tables.line(judge(POINT, {"impala": [measures(1)], "stock": [measures(2)]}, level=3.99))
    made = tables.records(record.origin(), [found], {POINT: {"impala": [measures(1)], "stock": [measures(2)]}}, {})
    assert {r.params["load"] for r in made if r.variant == str(POINT)} == {"2.5x"}


def test_bounds_of_one_seed_are_compared_with_that_seed():
    found = judge(POINT, {"impala": [measures(10), measures(30)], "stock": [measures(40)] * 2, "belady": [measures(5)]})
    assert found.to_bound == pytest.approx(2.0)


def test_hits_are_asked_for_where_host_and_nvme_are():
    found = {"impala": [replace(measures(1), hit_ratio=0.90)], "stock": [measures(2)]}
    endless = {**found, "unbounded": [replace(measures(1), hit_ratio=0.93)]}
    assert judge(POINT, endless).hits == pytest.approx(0.90 / 0.93)
    assert judge(POINT, endless).finds_enough is False
    assert judge(replace(POINT, tiers="host 1x"), endless).finds_enough is None
    assert judge(POINT, found).finds_enough is None


def test_paying_for_what_it_decides_is_judged_apart():
    found = judge(POINT, {"impala": [measures(50)], "stock": [measures(100)], PAYING: [measures(103)]})
    assert found.best == "stock"
    assert found.wins
    assert found.paying == (pytest.approx(1.03), pytest.approx(1.0))
    assert found.wins_paying is False


def test_the_bars_are_rows_of_the_targets():
    won = {"impala": [measures(1)], "stock": [measures(2)], "unbounded": [measures(1)]}
    lost = {**won, "impala": [measures(3)]}
    points = [POINT, replace(POINT, level=8.0), replace(POINT, tiers="host 1x")]
    found = {points[0]: won, points[1]: lost, points[2]: won}
    misses = {points[0]: (125, 100), points[1]: (126, 100)}
    verdicts = [judge(p, by_policy, misses=misses.get(p)) for p, by_policy in found.items()]
    made = tables.records(record.origin(), verdicts, found, {"covers": tables.WHOLE})
    rows = [t for t in targets.TARGETS if t.question == "sim/study" and t.variant == "impala"]
    by_metric = {t.metric: t.found(made) for t in rows}
    assert {m: r and (round(r.p50), r.params["met"], r.n) for m, r in by_metric.items()} == {
        tables.STALLS: (67, "2 of 3", 3),
        tables.TASKS: (100, "3 of 3", 3),
        tables.HITS: (100, "2 of 2", 2),
        tables.MISSES: (50, "1 of 2", 2),
    }
    part = tables.records(record.origin(), verdicts, found, {"covers": "a part"})
    assert all(t.found(part) is None for t in rows)
    assert "| 2 of 3 |" in targets.table(made, [t for t in rows if t.metric == tables.STALLS])[-1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--workload", "agnets"], "agnets"),
        (["--workload", "mix"], "mix"),
        (["--policies", "stock,impala,plass"], "plass"),
        (["--policies", "impala"], "rival"),
        (["--policies", "stock,belady"], "impala"),
        (["--html", "none/there/page.html"], "page.html"),
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

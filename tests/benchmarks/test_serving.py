"""The serving benchmark without an engine: plans, figures, search, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serving import figures
from benchmarks.serving.experiments import EXPERIMENTS, Source
from benchmarks.serving.sustained import most, steady
from impala_vllm.replay import recording
from impala_vllm.replay.arms import ARMS, Machine
from impala_vllm.replay.load import Run, TurnResult
from impala_vllm.replay.measures import Measures, measure
from impala_vllm.replay.trial import Trial
from impala_vllm.replay.vocabulary import Vocabulary

WORDS = Vocabulary(10, 4000, 2, 3)
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,80,800\n"
)


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_every_experiment_names_real_arms_and_figures(name: str) -> None:
    experiment = EXPERIMENTS[name]
    assert set(experiment.arms) <= set(ARMS)
    assert {*experiment.figures, *experiment.ratios} <= set(Measures.__dataclass_fields__)
    Machine(Path("m"), dtype="float32", **experiment.machine)


def test_agent_experiments_run_on_the_bundled_log_too() -> None:
    experiment = EXPERIMENTS["link-f1"]
    plan = experiment.plan(Source(recording.bundled(), 0, WORDS), experiment)
    assert len(plan.roots()) == 8
    assert plan.num_capped_sessions == 0


def test_single_requests_take_their_lengths_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "azure.csv"
    log.write_text(AZURE)
    experiment = EXPERIMENTS["observe-cost-azure"]
    plan = experiment.plan(Source(log, 0, WORDS), experiment)
    assert [(len(t.prompt), len(t.output)) for _, _, t in plan.turns()] == [(601, 4), (10, 48)]


def trial(arm: str, repetition: int, seconds: float) -> Trial:
    result = TurnResult("a", None, 0, "a#0", "r-0", 0.0, seconds / 2, seconds, 0.0, 10, 2, 0, None)
    run = Run((result,), seconds)
    return Trial(arm, repetition, run, measure(run, cpu_s=seconds))


def test_records_hold_every_arm_and_paired_ratios() -> None:
    experiment = EXPERIMENTS["observe-cost-agent"]
    plan = experiment.plan(Source(recording.bundled(), 0, WORDS), experiment)
    trials = [trial("stock", 0, 10.0), trial("impala-observe", 0, 11.0), trial("impala-observe", 1, 9.0),
              trial("stock", 1, 10.0)]  # fmt: skip
    machine = Machine(Path("m"), dtype="float32")
    made = figures.records(experiment, trials, plan, machine, Path("log"), {"seed": 3, "fresh_engines": False})
    ratios = {r.metric: r for r in made if r.metric.endswith("ratio")}
    assert ratios["cpu_s ratio"].p50 == pytest.approx(1.0)
    assert (ratios["cpu_s ratio"].better, ratios["requests_per_s ratio"].better) == ("lower", "higher")
    assert ratios["cpu_s ratio"].params["interval"] == "0.9000-1.1000 (50%)"
    assert {r.variant for r in made} == {"stock", "impala-observe"}
    assert all(r.seed == 3 and r.source == "measured" for r in made)


@pytest.mark.parametrize("sustained", [1, 2, 3, 7, 8, 12, 20])
def test_the_search_finds_the_most_that_is_sustained(sustained: int) -> None:
    asked: list[int] = []

    def slowdown(n: int) -> float:
        asked.append(n)
        return 1.0 if n <= sustained else 3.0

    assert most(slowdown, 12) == min(sustained, 12)
    assert len(asked) == len(set(asked)) <= 8


def test_ramps_do_not_count() -> None:
    def task(name: str, start: float, end: float) -> TurnResult:
        return TurnResult(name, None, 0, f"{name}#0", f"r-{name}", start, start, end, 0.0, 1, 1, 0, None)

    run = Run((task("a", 0, 2), task("b", 0, 3), task("c", 2, 4), task("d", 3, 5), task("e", 4, 6)), 6)
    assert steady(run) == {"c", "d"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "Invalid value for"),
        (["observe-cost-azure"], "needs --traces"),
        (["baseline", "--traces", "/no/such/file"], "/no/such/file: cannot read it"),
        (["baseline", "--arms", "warp"], "unknown arm 'warp'"),
        (["baseline", "--poisson", "1", "--concurrency", "2"], "drop one of them"),
        (["baseline", "--html", "/no/such/folder/r.html"], "no such folder"),
        (["sustained", "--fresh-engines"], "--fresh-engines changes nothing here"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: list[str], says: str) -> None:
    pytest.importorskip("torch")  # the model is looked up before the log
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving", *arguments], capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 2
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr

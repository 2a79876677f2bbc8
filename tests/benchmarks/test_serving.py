"""The serving benchmark without an engine: plans, figures, search, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import questions
from benchmarks.serving import __main__ as serving
from benchmarks.serving import capacity, figures, links, pool
from benchmarks.serving.experiment import Source
from benchmarks.serving.experiments import EXPERIMENTS
from benchmarks.serving.sustained import most, steady
from impala_vllm.replay import recording, synthetic
from impala_vllm.replay.arms import ARMS, Arm, Machine, Room
from impala_vllm.replay.client import Client
from impala_vllm.replay.load import Arrivals, Load, Run, TurnResult
from impala_vllm.replay.measures import Measures, measure
from impala_vllm.replay.server import Server
from impala_vllm.replay.trial import Trial
from impala_vllm.replay.vocabulary import Vocabulary
from tests.replay.test_trial import ENGINE

WORDS = Vocabulary(10, 4000, 2, 3)
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,80,800\n"
)


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_every_experiment_names_real_arms_and_figures(name: str) -> None:
    experiment = EXPERIMENTS[name]
    assert set(experiment.arms) <= set(ARMS)
    atoms = {atom for name in (*experiment.figures, *experiment.ratios) for atom in name.split(" / ")}
    assert {atom.partition(" of ")[0] for atom in atoms} <= set(Measures.__dataclass_fields__)
    Machine(Path("m"), dtype="float32", room=Room(**experiment.room), **experiment.machine)


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_every_experiment_is_a_question(name: str) -> None:
    assert questions.question(f"serving/{name}") is not None


def test_a_level_of_oversubscription_is_a_question_of_its_own() -> None:
    found = questions.question("serving/agents-0.5x")
    assert found is not None
    assert found.title.endswith("; working set 0.5x HBM")
    assert questions.question("serving/nonsense-4x") is None


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_every_part_that_a_figure_names_is_in_the_plan(name: str) -> None:
    experiment = EXPERIMENTS[name]
    plan = experiment.plan(Source(recording.bundled(), 0, WORDS, 4), experiment)
    found = {s.session_id.partition("/")[0] for s in plan.sessions}
    atoms = {atom for f in (*experiment.figures, *experiment.ratios) for atom in f.split(" / ") if " of " in atom}
    assert {atom.partition(" of ")[2] for atom in atoms} <= found


def test_a_crowd_repeats_the_bundled_log_in_other_words() -> None:
    experiment = EXPERIMENTS["compute-bound"]
    plan = experiment.plan(Source(recording.bundled(), 0, WORDS), experiment)
    assert len(plan.roots()) == 160
    live_tokens = plan.working_set_tokens() * capacity.LIVE / 160
    assert live_tokens < 0.9 * experiment.machine["hbm_blocks"] * 32
    first = {p: next(s for s in plan.sessions if s.session_id.startswith(p)).turns[0] for p in ("copy0/", "copy1/")}
    assert first["copy0/"].prompt[:8] != first["copy1/"].prompt[:8]


def test_a_drift_is_four_quarters_of_a_minute() -> None:
    experiment = EXPERIMENTS["drift"]
    plan = experiment.plan(Source(recording.bundled(), 0, WORDS), experiment)
    starts = {s.session_id.partition("/")[0]: int(s.arrival_s // 60) for s in plan.roots()}
    assert starts == {"short-gaps": 0, "long-gaps": 1, "single-requests": 2, "fan-outs": 3}
    gaps = {s.session_id.partition("/")[0]: max(t.gap_s for t in s.turns) for s in plan.roots()}
    assert gaps["short-gaps"] <= 0.5 < gaps["long-gaps"]


def test_a_control_without_a_log_draws_its_lengths(tmp_path: Path) -> None:
    experiment = EXPERIMENTS["control"]
    drawn = experiment.plan(Source(recording.bundled(), 0, WORDS), experiment)
    assert (len(drawn.roots()), drawn.num_turns()) == (300, 300)
    log = tmp_path / "azure.csv"
    log.write_text(AZURE)
    given = experiment.plan(Source(log, 0, WORDS), experiment)
    assert [len(t.prompt) for _, _, t in given.turns()] == [601, 10]


def test_a_pool_is_sized_by_the_working_set_and_never_below_one_request() -> None:
    plan = synthetic.independent(WORDS, [(1000, 24)] * 8)
    machine = Machine(Path("m"), dtype="float32")
    assert (roomy := pool.oversubscribed(machine, plan, 0.5)).hbm_blocks == 512
    assert roomy.max_model_len == 8192
    assert (tight := pool.oversubscribed(machine, plan, 4.0)).hbm_blocks == 64
    assert tight.max_model_len == 1024
    # 32 blocks would do for the request, and vLLM keeps one.
    with pytest.raises(ValueError, match="a pool of 32 blocks is too small: the longest request needs 32"):
        pool.oversubscribed(machine, plan, 8.0)
    assert pool.fitted(machine, plan) is machine


def test_a_figure_is_of_the_run_of_a_part_or_of_two_figures() -> None:
    def turn(session: str, seconds: float) -> TurnResult:
        return TurnResult(session, None, 0, session, session, 0.0, 0.1, seconds, 0.0, 10, 2, 0, None)

    run = Run((turn("a/x", 2.0), turn("b/x", 6.0)), 6.0)
    made = Trial("stock", 0, run, measure(run))
    assert figures.figure(made, "jct_mean_s") == 4.0
    assert figures.figure(made, "jct_mean_s of b") == 6.0
    assert figures.figure(made, "jct_mean_s of b / jct_mean_s of a") == 3.0
    assert figures.figure(made, "cpu_s") is None


def test_records_of_a_part_have_its_unit_and_those_of_a_level_its_question() -> None:
    experiment = EXPERIMENTS["head-of-line"]
    plan = experiment.plan(Source(recording.bundled(), 0, WORDS, 2), experiment)

    def trial_of(arm: str, seconds: float) -> Trial:
        results = (
            TurnResult(s.session_id, None, 0, s.session_id, s.session_id, 0.0, 0.1, seconds, 0.0, 10, 2, 0, None)
            for s in plan.sessions
        )
        run = Run(tuple(results), seconds)
        return Trial(arm, 0, run, measure(run))

    trials = [trial_of("stock", 2.0), trial_of("impala-enforce", 1.0)]
    options = {"seed": 0, "fresh_engines": False, "oversubscription": 4.0}
    made = figures.records(experiment, trials, plan, Machine(Path("m"), dtype="float32"), Path("log"), options)
    assert {r.question for r in made} == {"serving/head-of-line-4x"}
    short = {(r.variant, r.metric): r for r in made}
    assert short["stock", "jct_p95_s of short-alone"].unit == "s"
    assert short["stock", "jct_p95_s of short-beside-long / jct_p95_s of short-alone"].unit == "x"
    assert short["impala-enforce", "jct_mean_s of long ratio"].p50 == 0.5


def test_links_are_multiples_of_what_stock_prefills(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[Server] = []

    def fake(arm: Arm, machine: Machine, logs: Path) -> Server:
        started.append(Server(arm.name, [sys.executable, "-c", ENGINE, "{port}"], logs / f"{arm.name}.log"))
        return started[-1]

    salts: list[str | None] = []

    class Salted(Client):
        def __init__(self, base_url: str, model: str, *, salt: str | None = None) -> None:
            super().__init__(base_url, model, salt=salt)
            salts.append(salt)

    monkeypatch.setattr(links.arms, "server", fake)
    monkeypatch.setattr(links, "Client", Salted)
    plan = synthetic.independent(WORDS, [(100, 4)] * 3)
    machine = Machine(tmp_path, dtype="float32")
    assert links.prefill_rate(plan, machine, tmp_path) > 0
    assert [(server.name, server.alive()) for server in started] == [("stock-prefill", False)]
    assert len(set(salts)) == 3  # a prefix that prompts share is computed for each
    monkeypatch.setattr(links, "prefill_rate", lambda *_: 1249.0)
    room = links.sized(Room(host_share=0.5), (12.0, 0.7), plan, machine, tmp_path)
    assert room == Room(host_share=0.5, host_tokens_per_s=15_000.0, nvme_tokens_per_s=870.0)
    assert links.with_caps(room, 99.0, None) == Room(0.5, host_tokens_per_s=99.0, nvme_tokens_per_s=870.0)


class Stopped(Exception):
    """So far and no further."""


@pytest.mark.parametrize(
    ("given", "host", "nvme"), [((), 12.0, 2.0), (("--host-cap", "99"), 99.0, 2.0), (("--nvme-cap", "9"), 12.0, 9.0)]
)
def test_a_link_without_a_cap_by_hand_is_sized(
    given: tuple[str, ...], host: float, nvme: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rooms: list[Room] = []

    def describe(plan: object, experiment: object, machine: Machine) -> str:
        rooms.append(machine.room)
        raise Stopped

    monkeypatch.setattr(serving.signal, "signal", lambda *_: None)
    monkeypatch.setattr(serving.tempfile, "mkdtemp", lambda **_: str(tmp_path))
    monkeypatch.setattr(links, "prefill_rate", lambda *_: 1.0)
    monkeypatch.setattr(serving.figures, "describe", describe)
    monkeypatch.setattr(serving.tiny_model, "build", lambda _: Path("m"))
    monkeypatch.setattr(serving.Vocabulary, "of_model", lambda _: WORDS)
    monkeypatch.setattr(serving.pool, "fitted", lambda machine, _: machine)
    with pytest.raises(Stopped):
        serving.main(["tiers", "--no-record", *given], standalone_mode=False)
    assert [(room.host_tokens_per_s, room.nvme_tokens_per_s) for room in rooms] == [(host, nvme)]


@pytest.mark.parametrize(
    ("name", "caps", "told"),
    [
        ("tiers", {}, "host 12x, NVMe 2x"),
        ("tiers-slow", {}, "host 4x, NVMe 0.7x"),
        ("tiers", {"host_cap": 99.0}, "host by hand, NVMe 2x"),
        ("tiers-uncapped", {}, None),
    ],
)
def test_records_tell_how_fast_links_are_to_the_prefill(name: str, caps: dict[str, float], told: str | None) -> None:
    experiment = EXPERIMENTS[name]
    plan = experiment.plan(Source(recording.bundled(), 0, WORDS, 2), experiment)
    trials = [trial("impala-tiers", 0, 1.0)]
    options = {"seed": 0, "fresh_engines": False, **caps}
    made = figures.records(experiment, trials, plan, Machine(Path("m"), dtype="float32"), Path("log"), options)
    assert {r.params.get("links") for r in made} == {told}


def test_tiers_tell_shares_only_of_what_there_was() -> None:
    def trial_of(**tiers: float) -> Trial:
        return Trial("impala-tiers", 0, Run((), 0.0), measure(Run((), 0.0)), tiers=tiers)

    trials = [trial_of(resumed_turns=8.0, resumed_turns_found=2.0), trial_of(resumed_turns=0.0), trial_of()]
    assert figures.tier_shares(trials) == [("resumes that found their KV in HBM or host", "higher", [25.0])]


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
        (["agents", "--hbm-blocks", "90", "--oversubscription", "2"], "drop one of them"),
        (["agents", "--oversubscription", "30"], "is too small: the longest request needs"),
        (["drift", "--poisson", "1"], "leave --poisson and --concurrency out"),
        (["sustained", "--fresh-engines"], "--fresh-engines changes nothing here"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: list[str], says: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")  # the model is looked up before the log
    command = [sys.executable, "-m", "benchmarks.serving", *arguments]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert ran.returncode == 2
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not list(tmp_path.glob("impala-serving-*"))


def _turn(number, start_s, end_s):
    return TurnResult(f"s{number}", None, 0, "r", "r", start_s, start_s, end_s, 0.0, 1, 1, 0, None)


def test_capacity_is_what_ends_while_others_wait_to_start():
    lanes = [_turn(i, 2.0 * (i // 4), 2.0 * (i // 4) + 2.0) for i in range(40)]  # four at a time, two seconds each
    assert capacity.tasks_per_s(Run(tuple(lanes), 20.0)) == pytest.approx(2.0, rel=0.25)
    assert capacity.load_at(0.95, 2.0, 7) == Load(Arrivals.POISSON, rate_per_s=1.9, seed=7)
    with pytest.raises(ValueError, match="too few to measure capacity"):
        capacity.tasks_per_s(Run((_turn(0, 0.0, 9.0), _turn(1, 1.0, 9.0)), 9.0))


def test_an_interrupted_run_counts_what_all_arms_have_had() -> None:
    def trial(arm: str, repetition: int) -> Trial:
        return Trial(arm, repetition, Run((), 0.0), measure(Run((), 0.0), computed_tokens=0, new_tokens=0, cpu_s=0.0))

    trials = [trial("a", 0), trial("b", 0), trial("b", 1)]
    assert figures.whole(trials, ["a", "b"]) == trials[:2]
    assert figures.whole(trials[:1], ["a", "b"]) == []

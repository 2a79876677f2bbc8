"""The whole call: without a GPU, with a wrong command line, and rehearsed on the CPU."""

from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.gpu import __main__ as entry


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OUT", raising=False)


def test_without_a_gpu_it_says_so_in_one_line_and_succeeds(tmp_path: Path, capfd):
    assert entry.main(["--out", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr()
    assert len(printed.out.splitlines()) == 1
    assert "no GPU here" in printed.out
    assert printed.err == ""
    assert not (tmp_path / "out").exists()


def test_a_step_that_does_not_exist_is_a_wrong_command_line(capsys):
    assert entry.main(["--only", "everything"]) == 2
    assert "no step 'everything'" in capsys.readouterr().err


def test_without_vllm_its_steps_are_left_out_by_name_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
):
    monkeypatch.setattr(entry, "no_gpu", lambda: None)
    monkeypatch.setattr(entry.bundle, "BUNDLES", tmp_path / ".gpu")
    monkeypatch.setattr(entry.bundle, "missing", lambda site: ["vllm"])
    ran: list[str] = []

    def run(chosen, budget_s, launch, say):
        ran.extend(step.name for step in chosen)
        return []

    monkeypatch.setattr(entry.steps, "run", run)
    assert entry.main(["--only", "ops,worker,engine-impala,tune", "--out", str(tmp_path)]) == 0
    assert ran == ["ops", "tune"]
    printed = capfd.readouterr().out
    assert "neither in .gpu/ nor installed: vllm" in printed
    assert "worker: left out, there is no vLLM" in printed
    assert "engine-impala-v1: left out" in printed


def test_the_time_it_takes_to_find_the_gpu_is_part_of_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now_s = [0.0]

    def slow() -> None:
        now_s[0] += 170.0

    budgets: list[float] = []
    monkeypatch.setattr(entry.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(entry, "no_gpu", slow)
    monkeypatch.setattr(entry.steps, "run", lambda chosen, budget_s, *_: budgets.append(budget_s) or [])
    assert entry.main(["--only", "ops", "--out", str(tmp_path), "--budget-s", "565"]) == 0
    assert budgets == [395.0]


def test_steps_can_be_listed_without_a_gpu(capsys):
    assert entry.main(["--list", "--only", "sessions-1b"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_rehearsal_goes_through_checks_and_figures(tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    pytest.importorskip("vllm")
    monkeypatch.setenv("OUT", str(tmp_path))
    assert entry.main(["--rehearse", "--only", "link,ops,worker", "--budget-s", "10000", "--commit", "0123"]) == 0
    printed = capfd.readouterr().out
    assert "every byte is back" in printed
    assert "3 done, 0 skipped, 0 FAILED" in printed
    records = record.read(tmp_path.glob("*.jsonl"))
    assert {r.metric for r in records} >= {"H2D", "D2H", "rehearsal, H2D, 3 blocks"}
    assert {r.commit for r in records} == {"0123"}
    assert {r.source for r in records} == {"rehearsal"}


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_a_rehearsal_replays_sessions_on_real_engines(tmp_path: Path, capfd):
    pytest.importorskip("vllm")
    # Each is an engine of its own: between them they go through all that engine steps do.
    asked = ["--only", "engine-fp8,sessions-1b-impala", "--without", "sessions-1b-impala-vllm-swap"]
    assert entry.main(["--rehearse", *asked, "--out", str(tmp_path), "--budget-s", "10000"]) == 0
    printed = capfd.readouterr().out
    assert "2 done, 0 skipped, 0 FAILED" in printed, printed
    assert "KV moved by PageCopyWorker: up" in printed
    assert "KV moved by PageCopyWorker, as FP8" in printed
    assert "from FP8" in printed
    failed = [r.p50 for r in record.read(tmp_path.glob("*.jsonl")) if r.metric == "num_failed"]
    assert failed == [0.0]

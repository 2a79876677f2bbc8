"""The restart benchmark against a small server that stands in for vLLM and forgets everything."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from rich.console import Console

from benchmarks.serving import restart
from benchmarks.serving.experiment import Source
from benchmarks.serving.experiments import EXPERIMENTS
from impala_vllm.replay import arms, recording
from impala_vllm.replay.arms import ARMS, Arm, Machine
from impala_vllm.replay.plan import Plan, PlannedSession, PlannedTurn
from impala_vllm.replay.server import Server
from impala_vllm.replay.vocabulary import Vocabulary
from tests.replay.test_trial import ENGINE

WORDS = Vocabulary(10, 4000, 2, 3)


def session(name: str, first: int, num_turns: int) -> PlannedSession:
    """Each turn is 32 tokens longer than the one before."""
    turns = (PlannedTurn(f"{name}#{i}", (first, *range(20, 19 + 32 * (i + 1))), (2,), 0.0) for i in range(num_turns))
    return PlannedSession(name, tuple(turns))


@pytest.mark.parametrize("kill", [False, True])
def test_a_server_that_forgets_computes_all_beyond_an_infinite_cache(
    kill: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[Server] = []

    def fake(arm: Arm, machine: Machine, logs: Path) -> Server:
        started.append(Server(arm.name, [sys.executable, "-c", ENGINE, "{port}"], logs / f"{arm.name}.log"))
        return started[-1]

    monkeypatch.setattr(restart.arms, "server", fake)
    monkeypatch.setattr(restart, "SETTLED_S", 0.05)
    plan = Plan((session("a", 11, 3), session("b", 12, 3)))
    machine = Machine(tmp_path, dtype="float32")
    found = restart._restarted(plan, 2, ARMS["impala-tiers"], machine, kill, tmp_path, Console(quiet=True))
    figures = dict(zip(restart.FIGURES, found, strict=True))
    assert figures["computed tokens after the restart"] == 2 * 96
    # A prompt's last token is always computed, and with it its block.
    assert figures["computed beyond an infinite cache"] == 2 * 64
    assert figures["share computed beyond it"] == pytest.approx(100 * 2 / 3)
    assert len(started) == 2
    assert not any(server.alive() for server in started)


def test_a_disk_of_stocks_has_settled_once_its_files_grow_no_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disk, now, num_slept = arms.disk(ARMS["stock-lru-fs"], tmp_path), [0.0], [0]
    (disk / "a").mkdir(parents=True)

    def sleep(seconds: float) -> None:
        now[0] += seconds
        num_slept[0] += 1
        if num_slept[0] <= 5:
            (disk / "a" / f"{num_slept[0]}.bin").write_bytes(b"kv")

    monkeypatch.setattr(restart, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(restart.counters, "scrape", lambda _: dict[str, float]())
    restart._settle(Server("stock-lru-fs", [], tmp_path / "log"), disk)
    assert num_slept[0] == 6


def test_a_restart_comes_between_the_turns_of_sessions_that_have_enough_of_them() -> None:
    experiment = EXPERIMENTS["tiers"]
    plan = experiment.plan(Source(recording.bundled(), 0, WORDS), experiment)
    before, then = restart.turns_of(plan, 0, 4), restart.turns_of(plan, 4, 5)
    assert {len(s.turns) for s in before.sessions} == {4}
    fifth = {s.session_id: s.turns[4].request_id for s in plan.roots() if len(s.turns) > 4}
    assert {s.session_id: s.turns[0].request_id for s in then.sessions} == fifth


def test_a_restart_wants_a_disk() -> None:
    refused = CliRunner().invoke(restart.main, ["--arms", "impala-host"])
    assert refused.exit_code == 2
    assert "impala-host has no disk" in refused.output

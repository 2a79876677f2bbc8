"""Real processes that end well, crash, hang and leave others behind."""

import fcntl
import os
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import bundle, steps
from benchmarks.gpu.launch import Launcher
from benchmarks.gpu.steps import Status

HOLDER = """
import fcntl, signal, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
signal.pause()
"""
LEAVES_A_HOLDER = f"""
import subprocess, sys
left = subprocess.Popen([sys.executable, "-c", {HOLDER!r}, sys.argv[1]], stdout=subprocess.PIPE)
left.stdout.readline()
"""


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    env = bundle.environment(os.environ, None, tmp_path, rehearsal=True, commit="0123", command="a command")
    return Launcher(tmp_path, env)


def _python(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", program, *arguments]


def test_exit_codes_and_signals_are_told_apart(launcher: Launcher):
    def status(program: str) -> tuple[Status, str]:
        outcome = launcher.supervise("it", _python(program), 60)
        return outcome.status, outcome.why.partition(";")[0]

    assert status("pass") == (Status.DONE, "")
    assert status("raise SystemExit(3)") == (Status.SKIPPED, "")
    assert status("raise SystemExit(1)") == (Status.FAILED, "exit 1")
    assert status("import os; os.kill(os.getpid(), 11)") == (Status.FAILED, "signal SIGSEGV")


def test_what_hangs_is_stopped_and_the_end_of_its_log_shown(launcher: Launcher, tmp_path: Path, capfd):
    (tmp_path / "it.log").write_text("where it was\n")
    # Deaf to the polite signal too.
    program = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: signal.pause()"
    outcome = launcher.supervise("it", _python(program), 0.5)
    assert outcome.status is Status.FAILED
    assert "time was up" in outcome.why
    assert "where it was" in capfd.readouterr().out


def test_nothing_that_a_step_started_outlives_it(launcher: Launcher, tmp_path: Path):
    lock = tmp_path / "lock"
    assert launcher.supervise("it", _python(LEAVES_A_HOLDER, str(lock)), 60).status is Status.DONE
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits for ever if its holder lives


def test_what_cannot_be_started_has_failed(launcher: Launcher):
    assert launcher.supervise("it", ["/no/such/python"], 1).status is Status.FAILED


def test_a_step_prints_its_own_lines_and_logs_everything_else(launcher: Launcher, tmp_path: Path, capfd):
    (step,) = steps.pick(["device"])
    assert launcher(step, 200).status is Status.DONE
    printed = capfd.readouterr().out
    assert "adds up: True" in printed
    assert (tmp_path / "device.log").exists()
    assert all(line.startswith("  device: ") for line in printed.splitlines())

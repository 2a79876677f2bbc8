"""Runs a step in a process group of its own and ends the group when its time is up."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.child import SKIPPED
from benchmarks.gpu.steps import Outcome, Status, Step

ROOT = Path(__file__).resolve().parents[2]
TAIL_LINES = 12
GRACE_S = 5.0
"""For a stopped step to write down where it was."""


class Launcher:
    """Starts steps that write to `directory`, with `environment` around them."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._directory = directory
        self._environment = environment

    def __call__(self, step: Step, limit_s: float) -> Outcome:
        child = [sys.executable, "-m", "benchmarks.gpu.child", step.name, str(self._directory), f"{limit_s:.1f}"]
        return self.supervise(step.name, child, limit_s)

    def supervise(self, name: str, command: Sequence[str], limit_s: float) -> Outcome:
        """Run a command; whatever it leaves running is ended, as it would disturb the next and hold its memory."""
        began = time.monotonic()
        try:
            process = subprocess.Popen(command, cwd=ROOT, env=dict(self._environment), start_new_session=True)
        except OSError as e:
            return Outcome(name, Status.FAILED, why=f"cannot start {command[0]}: {e}")
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            _end(process)
            return self._failed(name, time.monotonic() - began, "stopped, its time was up")
        except BaseException:
            _end(process)
            raise
        seconds = time.monotonic() - began
        _signal(process.pid, signal.SIGKILL)
        if code == 0:
            return Outcome(name, Status.DONE, seconds)
        if code == SKIPPED:
            return Outcome(name, Status.SKIPPED, seconds)
        return self._failed(name, seconds, f"exit {code}" if code > 0 else f"signal {signal.Signals(-code).name}")

    def _failed(self, name: str, seconds: float, why: str) -> Outcome:
        log = self._directory / f"{name}.log"
        try:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        for line in lines[-TAIL_LINES:]:
            print(f"  {name}: > {line[:300]}", flush=True)
        return Outcome(name, Status.FAILED, seconds, f"{why}; see {log.name}")


def _end(process: subprocess.Popen[bytes]) -> None:
    _signal(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    _signal(process.pid, signal.SIGKILL)
    process.wait()


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)

"""A server process of ours: started in its own process group, waited for, and surely stopped.

Stops by the group it started, never by name; also at interpreter exit, so Ctrl-C leaves nothing behind.
"""

import atexit
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

_CAUSE = re.compile(r"\b(?:\w*(?:Error|Exception)|error): .+")


class ServerError(RuntimeError):
    """A server that did not come up or died, in one line with the place of its log."""


class Server:
    """One process group that answers HTTP on a loopback port. A context manager; `stop()` is idempotent."""

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        """`command` may hold `{port}`; a free one is chosen."""
        self.name = name
        self.log = log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [part.replace("{port}", str(self.port)) for part in command]
        self._env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it; `wait_ready` tells when it answers."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        atexit.register(self.stop)
        with self.log.open("wb") as out:
            try:
                self._process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=self._env,
                    start_new_session=True,
                )
            except OSError as e:
                raise ServerError(f"{self.name}: cannot start {self.command[0]} ({e.strerror})") from e

    def wait_ready(self, timeout_s: float = 300.0, on_wait: Callable[[float], None] | None = None) -> float:
        """Seconds until /health answered 200. `on_wait` is called about four times a second."""
        assert self._process is not None, "start() comes first"
        begin = time.monotonic()
        while True:
            waited = time.monotonic() - begin
            code = self._process.poll()
            if code is not None:
                self.stop()
                self.fail(f"exited with {code} before it was ready")
            if _answers(f"{self.url}/health"):
                return waited
            if waited > timeout_s:
                self.stop()
                raise ServerError(f"{self.name}: not ready after {timeout_s:.0f} s; see {self.log}")
            if on_wait is not None:
                on_wait(waited)
            time.sleep(0.25)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def check_alive(self) -> None:
        """Raise ServerError if it has died since it was ready."""
        if not self.alive():
            self.fail("died during the run")

    def fail(self, what: str) -> NoReturn:
        """Raise ServerError with the cause its log gives."""
        raise ServerError(f"{self.name}: {what}: {self._last_words()}")

    def cpu_seconds(self) -> float:
        """CPU time so far of every living process of the group, children that ended included."""
        if self._process is None:
            return 0.0
        return sum(ticks for _, ticks in _group(self._process.pid)) / os.sysconf("SC_CLK_TCK")

    def stop(self, grace_s: float = 15.0) -> None:
        """Ask the group to end, then make it; returns when none of it is left."""
        process = self._process
        if process is None:
            return
        group = process.pid
        for sign, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(group, sign)
            except ProcessLookupError:
                break
            deadline = time.monotonic() + patience_s
            while time.monotonic() < deadline and (process.poll() is None or _group(group)):
                time.sleep(0.05)
            if process.poll() is not None and not _group(group):
                break
        process.wait()
        self._process = None
        atexit.unregister(self.stop)

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        # vLLM repeats a failure in every process above the one that failed: the first is the cause.
        cause = next((found.group(0) for line in lines if (found := _CAUSE.search(line))), None)
        return f"{(cause or (lines[-1] if lines else 'no output')).strip()[:300]} (log: {self.log})"


def free_port() -> int:
    """A loopback port that was free just now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError, ValueError):
        return False


def _group(group: int) -> list[tuple[int, int]]:
    """(pid, CPU ticks) of the group's processes that are not zombies."""
    found: list[tuple[int, int]] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The command name may hold spaces and brackets: count fields after the last one.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append((int(entry.name), sum(int(f) for f in fields[11:15])))
    return found

"""Life of a server process, with a small one that is not vLLM."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from impala_vllm.replay.server import Server, ServerError

HEALTHY = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Ok(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ok).serve_forever()
"""
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + HEALTHY


def make(script: str, tmp_path: Path) -> Server:
    return Server("fake", [sys.executable, "-c", script, "{port}"], tmp_path / "logs" / "fake.log")


def is_running(pid: int) -> bool:
    try:
        return "Z" not in (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_a_server_is_waited_for_and_stopped_with_its_children(tmp_path: Path) -> None:
    with make(HEALTHY, tmp_path) as server:
        server.wait_ready(30)
        assert server.alive()
        assert server.cpu_seconds() > 0
        child = int(server.log.read_text().split()[1])
        assert is_running(child)
    assert not server.alive()
    assert not is_running(child)
    server.stop()


def test_a_server_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    server = make(DEAF, tmp_path)
    server.start()
    server.wait_ready(30)
    server.stop(grace_s=0.2)
    assert not server.alive()


def test_a_server_that_dies_says_why_in_one_line(tmp_path: Path) -> None:
    server = make("raise ValueError('no such model')", tmp_path)
    server.start()
    with pytest.raises(ServerError, match=r"fake: exited with 1 .*ValueError: no such model \(log: ") as caught:
        server.wait_ready(30)
    assert "\n" not in str(caught.value)


def test_a_command_that_does_not_exist_says_so(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="cannot start /no/such/program"):
        Server("fake", ["/no/such/program"], tmp_path / "log").start()


def test_a_server_that_never_answers_is_given_up_and_stopped(tmp_path: Path) -> None:
    server = make("import time; time.sleep(600)", tmp_path)
    server.start()
    with pytest.raises(ServerError, match="not ready after"):
        server.wait_ready(0.1)
    assert not server.alive()


def test_an_interrupted_parent_leaves_nothing_behind(tmp_path: Path) -> None:
    # A test run in the background of a shell hands down that interrupts are ignored.
    parent = f"""
import signal, sys
from pathlib import Path
from impala_vllm.replay.server import Server
signal.signal(signal.SIGINT, signal.default_int_handler)
with Server("fake", [sys.executable, "-c", {HEALTHY!r}, "{{port}}"], Path({str(tmp_path / "fake.log")!r})) as server:
    server.wait_ready(30)
    print("ready", flush=True)
    import time
    time.sleep(600)
"""
    import subprocess

    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()
    child = int((tmp_path / "fake.log").read_text().split()[1])
    os.kill(process.pid, signal.SIGINT)
    process.wait(30)
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)

"""`impala router` from the command line: what it refuses, and that it serves and stops."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from impala_vllm.cli import router
from impala_vllm.cli.main import main


def refused(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["router", *args])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ([], "add --worker URL"),
        (["--worker", "host:8000"], "write http://HOST:PORT"),
        (["--worker", "http://h:1", "--registry", "cassandra://x"], "--registry cassandra://x"),
        (["--worker", "http://h:1", "--kv-events", "http://other:1=tcp://h:2"], "with the URL of a --worker"),
        (["--worker", "http://h:1", "--kv-events", "http://h:1=tcp://*:2"], "write tcp://HOST:PORT"),
        (["--workers-file", "/nowhere/workers"], "/nowhere/workers: cannot read it"),
        (["--worker", "http://h:1", "--max-held-mib", "255"], "--max-held-mib 255: below --max-body-mib 256"),
        (["--worker", "http://h:1", "--port", "x"], "see `impala router --help`"),
    ],
)
def test_bad_input_is_one_line(capsys, args, reason):
    pytest.importorskip("aiohttp")
    pytest.importorskip("zmq")
    assert reason in refused(capsys, *args)


def test_a_bad_line_of_the_workers_file_is_named(capsys, tmp_path):
    pytest.importorskip("zmq")
    path = tmp_path / "workers"
    path.write_text("# ours\nhttp://h:1\n\nnobody\n")
    assert f"{path}:4: nobody: not a server" in refused(capsys, "--workers-file", str(path))


def test_as_many_files_may_be_open_as_the_system_allows():
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard <= 512:
        pytest.skip("it allows few")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        router._raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_it_serves_says_that_no_server_is_there_and_stops():
    pytest.importorskip("zmq")
    command = [sys.executable, "-m", "impala_vllm.cli.main", "router", "--worker", "http://127.0.0.1:9", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert process.stderr is not None
        lines = []
        address = None
        while address is None or not any("http://127.0.0.1:9: down" in line for line in lines):
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
            found = re.search(r"running on (http://127\.0\.0\.1:[1-9]\d*)", lines[-1])
            address = found[1] if found else address
        with pytest.raises(urllib.error.HTTPError) as answer:
            urllib.request.urlopen(f"{address}/health", timeout=30)
        assert answer.value.code == 503
        assert json.load(answer.value)["status"] == "no server"
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()

"""`impala top` against a small HTTP server: what it shows, and what it says when there is nobody."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner
from rich.console import Console

from impala_vllm.cli import top as command
from impala_vllm.cli.main import impala, main
from impala_vllm.insight import live
from tests.insight.test_live import HEALTH, metrics, pages, row


class Pages(BaseHTTPRequestHandler):
    """impala's pages; the server's `status` and `key` say otherwise."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        wanted = f"Bearer {self.server.key}"
        if self.server.key and path != "/impala/health" and self.headers.get("Authorization") != wanted:
            self._answer(401, "{}")
        elif self.server.status != 200:
            self._answer(self.server.status, self.server.text)
        elif path == "/metrics":
            self._answer(200, metrics())
        elif path == "/impala/health":
            self._answer(200, json.dumps(HEALTH))
        else:
            state = self.path.rpartition("state=")[2]
            (page,) = pages(row(f"t[{state}]", state, source="continuation"))
            self._answer(200, json.dumps(page))

    def _answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as made:
        made.status, made.text, made.key = 200, "", None
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def url(server):
    return f"http://127.0.0.1:{server.server_address[1]}"


def failing(capsys, *args):
    with pytest.raises(SystemExit) as leaving:
        main(["top", *args])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return leaving.value.code, captured.err


def test_where_the_output_is_no_terminal_it_is_printed_once(server):
    done = CliRunner().invoke(impala, ["top", "--url", url(server) + "/"], env={"COLUMNS": "120"})
    assert done.exit_code == 0
    words = " ".join(done.output.split())
    for expected in ("degraded, mode enforce", "5 running, 7 gap", "2 held", "HBM 50%", "40.0% of prompt tokens"):
        assert expected in words
    for expected in ("the scheduler is paused", "policy is off", "t[running]", "t[gap]", "continuation 0.50"):
        assert expected in done.output


def test_nobody_there_is_one_line_and_2(server, capsys):
    at = url(server)
    server.shutdown()
    server.server_close()
    code, line = failing(capsys, "--url", at)
    assert code == 2
    assert "cannot be reached (Connection refused)" in line


@pytest.mark.parametrize(
    ("status", "text", "says"),
    [
        (404, "{}", "vLLM without --scheduler impala"),
        (200, "", "API key"),
        (500, "", "answers 500"),
        (503, '{"error": "the engine does not answer"}', "the engine does not answer"),
        (503, "<html>", "something else"),
    ],
)
def test_a_server_that_cannot_be_watched_is_one_line_and_2(server, capsys, status, text, says):
    server.status, server.text = status, text
    server.key = "k" if status == 200 else None
    code, line = failing(capsys, "--url", url(server))
    assert code == 2
    assert says in line


@pytest.mark.parametrize("address", ["localhost:8000", "file:///etc/passwd", "nonsense"])
def test_an_address_that_is_none_is_refused(capsys, address):
    code, line = failing(capsys, "--url", address)
    assert (code, "give http://HOST:PORT" in line) == (2, True)


def test_a_key_is_sent(server):
    server.key = "k"
    assert CliRunner().invoke(impala, ["top", "--url", url(server), "--api-key", "k"]).exit_code == 0


def test_a_server_that_goes_away_is_waited_for(server, monkeypatch):
    shown = []

    def sleep(_):
        shown.append(None)
        server.status = 500 if len(shown) == 1 else 200
        if len(shown) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", sleep)
    console = Console(force_terminal=True, width=100, height=40, record=True, file=io.StringIO())
    command._watch(url(server), None, 1.0, command.look(url(server), None), console)
    screens = console.export_text()
    assert screens.count("reconnecting: /impala/health answers 500") == 1
    assert screens.count("impala top") == 3


def test_the_screen_keeps_to_its_rows():
    now = live.view(1.0, HEALTH, pages(*(row(f"t{i}") for i in range(50))), metrics())
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(command.screen("u", now, live.rates(now, None), None, 5))
    text = console.export_text()
    assert "and 45 more" in text
    assert "t49" not in text

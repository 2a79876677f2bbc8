"""`impala audit URL` against a small HTTP server of two ranks."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from click.testing import CliRunner

from impala_vllm.cli.main import impala, main
from tests.insight.audit.test_server import FIRST, row


class Links(BaseHTTPRequestHandler):
    """Two rows a page, whatever is asked for; rank 1 has forgotten its first three."""

    def do_GET(self):
        query = parse_qs(urlsplit(self.path).query)
        after = int(query["after"][0])
        ranks = []
        for number, first in ((0, 1), (1, 4)):
            last = first + self.server.num_turns - 1
            rows = [(FIRST if n == first else row(cached_tokens=0)) | {"number": n} for n in range(first, last + 1)]
            page = [r for r in rows if r["number"] > after][:2]
            more = str(page[-1]["number"]) if page and page[-1]["number"] < last else None
            ranks.append({"rank": number, "rows": page, "next": more, "total": last, "block_tokens": 16})
        text = json.dumps({"ranks": ranks} if self.server.answers else {"error": "the engine does not answer"})
        self.send_response(200 if self.server.answers else 503)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Links) as made:
        made.num_turns, made.answers = 5, True
        made.url = f"http://127.0.0.1:{made.server_address[1]}"
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_every_row_of_every_rank_is_audited_once(server):
    done = CliRunner().invoke(impala, ["audit", server.url + "/", "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["requests"] == 10
    assert [(c["cause"], c["turns"]) for c in found["causes"]] == [("evicted", 8)]


def test_it_is_shown_as_a_log_is(server):
    done = CliRunner().invoke(impala, ["audit", server.url, "--price-per-mtok", "2"])
    assert done.exit_code == 0
    assert "10 requests in 2 sessions" in done.stdout
    assert "evicted" in done.stdout


@pytest.mark.parametrize(
    ("change", "args", "line"),
    [
        ({"num_turns": 0}, [], "has served no request yet"),
        ({"answers": False}, [], "the engine does not answer"),
        ({}, ["--show-text"], "--show-text is for logs"),
        ({}, ["--format", "weka"], "--format is for logs"),
        ({}, ["--block-tokens", "64"], "--block-tokens is for logs"),
    ],
)
def test_what_cannot_be_audited_is_one_line_and_2(server, capsys, change, args, line):
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(SystemExit) as leaving:
        main(["audit", server.url, *args])
    captured = capsys.readouterr()
    assert leaving.value.code == 2
    assert captured.out == ""
    assert line in captured.err

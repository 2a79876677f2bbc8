"""The ledger of a live server: its sums are the server's own counters, and its disk's trouble is nobody else's."""

import json
import shutil
import uuid

import pytest

from impala_vllm.insight.ledger.record import digest
from impala_vllm.replay.server import Server
from tests.e2e.client import Client, until
from tests.e2e.conftest import ENVIRONMENT, READY_S, command

WORDS = "turn over every stone in the garden and note what lives below it before the rain comes back again "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ledger")


@pytest.fixture(scope="module")
def server(model, folder):
    (folder / "books").mkdir()
    flags = ["--scheduler", "impala", "--impala-mode", "observe", "--impala-ledger", str(folder / "books" / "l.jsonl")]
    started = Server("ledger", command(model, *flags), folder / "server.log", ENVIRONMENT)
    try:
        started.start()
        started.wait_ready(READY_S)
        yield started
    finally:
        started.stop()


def newest(folder):
    """The newest record of each trace, and of what has none."""
    lines = []
    for file in (folder / "books" / "l.jsonl", folder / "books" / "l.jsonl.live"):
        lines += [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {line.get("trace", "rest"): line for line in lines if line["kind"] != "server"}


def test_sums_over_the_ledger_are_the_servers_counters(server, folder):
    client = Client(server.url)
    salt = uuid.uuid4().hex
    histories = {task: WORDS * 6 + task + WORDS * 2 for task in ("mend the parser", "write the tests")}
    for turn in range(4):
        for task in histories:
            answer = client.complete(histories[task], cache_salt=salt, session_id=f"{salt} {task}")
            histories[task] += answer["choices"][0]["text"] + f" result {turn} " + WORDS
    client.complete(WORDS * 4, cache_salt=salt, n=3, temperature=1.0)
    body = {"model": "tiny", "prompt": WORDS, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with client.open("/v1/completions", body) as response:
        response.readline()  # and hang up
    until(lambda: client.json("/impala/health")["status"] == "idle")
    reported = client.post("/impala/outcome", {"outcome": "success", "session_id": f"{salt} mend the parser"})
    assert reported == {"traces": 1}
    until(lambda: "success" in str(newest(folder)))

    def counted(source):
        return client.metric(f'vllm:prompt_tokens_by_source_total{{engine="0",model_name="tiny",source="{source}"')

    lines = newest(folder)
    tokens = {
        name: sum(line["tokens"].get(name, 0) for line in lines.values()) for name in ("computed", "hbm", "output")
    }
    assert tokens["computed"] == counted("local_compute") > 0
    assert tokens["hbm"] == counted("local_cache_hit") > 0
    aborted = [line for line in lines.values() if line.get("outcome") == "aborted"]
    told = client.metric("vllm:generation_tokens_total")
    assert len(aborted) == 1
    # Of the turn that was hung up on, the front-end counts what it had passed on by then.
    assert tokens["output"] - aborted[0]["tokens"]["output"] <= told <= tokens["output"]
    assert sum(line["turns"] for line in lines.values()) == 4 * 2 + 3 + 1
    assert client.metric("impala_ledger_dropped_records_total") == 0
    assert salt not in (folder / "books" / "l.jsonl.live").read_text()


def test_a_directory_that_is_taken_away_fails_no_request(server, folder):
    client = Client(server.url)
    shutil.rmtree(folder / "books")
    until(lambda: client.json("/impala/health")["status"] == "degraded")
    (reason,) = client.json("/impala/health")["reasons"]
    assert "the ledger cannot be written" in reason
    assert client.complete("hello")["choices"][0]["text"] is not None
    assert client.metric("impala_ledger_write_errors_total") > 0
    (folder / "books").mkdir()
    until(lambda: client.json("/impala/health")["status"] == "idle", 120.0)


def test_a_trace_that_goes_on_survives_the_server(server, folder):
    client = Client(server.url)
    client.complete("the last one", session_id="last")
    last = digest("session", "last")
    until(lambda: any(line.get("session") == last for line in newest(folder).values()))
    server.stop()
    (line,) = [line for line in newest(folder).values() if line.get("session") == last]
    assert (line["turns"], line["live"]) == (1, True)

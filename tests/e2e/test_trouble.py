"""A server restarted with everything awkward at once: no prefix caching, an identity that breaks,
API keys, two API server processes."""

import os
from pathlib import Path

import pytest

from impala_vllm.replay.server import Server
from tests.e2e.client import Client, until
from tests.e2e.conftest import ENVIRONMENT, READY_S, command

SABOTAGE = Path(__file__).parent / "sabotage"
"""Its sitecustomize makes identity raise for one session id."""


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trouble")
    flags = ["--scheduler", "impala", "--no-enable-prefix-caching", "--api-key", "secret", "--api-server-count", "2"]
    env = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(SABOTAGE), os.environ.get("PYTHONPATH", "")])}
    server = Server("trouble", command(model, *flags), folder / "trouble.log", env)
    with server:
        server.wait_ready(READY_S)
        yield server


@pytest.fixture
def client(server):
    return Client(server.url, "secret")


def test_traces_need_the_key_and_health_does_not(server, client):
    stranger = Client(server.url)
    assert stranger.get("/impala/health")[0] == 200
    assert stranger.get("/impala/traces")[0] == 401
    assert client.get("/impala/traces")[0] == 200
    assert stranger.get("/metrics")[0] == 200


def test_without_prefix_caching_explicit_sessions_alone_are_linked(client):
    anonymous = client.complete("hello " * 100)
    named = client.complete("hello " * 100, session_id="s")
    assert client.metric('impala_requests_unlinked_total{engine="0"}') == 1
    rows = client.rows("links")
    assert [row["source"] for row in rows] == ["explicit"]
    assert named["id"] in rows[0]["request_id"]
    assert anonymous["choices"][0]["token_ids"] == named["choices"][0]["token_ids"]


def test_an_identity_that_raises_is_switched_off_and_serving_goes_on(server, client):
    before = client.complete("hello", session_id="fine")["choices"][0]["token_ids"]
    struck = client.complete("hello", session_id="raise an error")["choices"][0]["token_ids"]
    after = client.complete("hello", session_id="fine")["choices"][0]["token_ids"]
    assert before == struck == after
    health = client.json("/impala/health")
    assert health["status"] == "degraded"
    assert health["reasons"] == ["rank 0: identity is switched off (RuntimeError; see the log)"]
    assert client.metric('impala_identity_on{engine="0"}') == 0.0
    until(lambda: "identity failed and is switched off" in server.log.read_text())
    assert server.log.read_text().count("identity failed and is switched off") == 1


def test_a_restarted_server_starts_afresh_on_the_same_port(server, client):
    server.stop()
    server.start()
    server.wait_ready(READY_S)
    assert client.complete("hello", session_id="fine")["choices"]
    health = client.json("/impala/health")
    assert health["status"] in ("ok", "idle")
    assert [row["trace_id"] for row in client.rows("links")] == ["t1"]

"""`impala router` in front of two real engines: the same hashes, sessions without ids, a server that is killed."""

import json
import os
import signal
import sys
import urllib.error

import pytest

pytest.importorskip("zmq")
pytest.importorskip("starlette")

from impala_vllm.fleet.hashing import Prompts, Tokenizer, handshake
from impala_vllm.replay.server import Server
from tests.e2e.client import Client, until
from tests.e2e.conftest import BLOCK_SIZE, ENVIRONMENT, READY_S, command

EVENTS = '{"enable_kv_cache_events": true, "endpoint": "tcp://*:0", "replay_endpoint": "tcp://*:0"}'
TOOL = {"name": "read_file", "description": "Read.", "parameters": {"type": "object", "properties": {"path": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "a.py"}'}}
STEM = "You are an agent that mends programs. Read before you write, and run the tests after each change. " * 12
WORDS = "open the file, look for the loop, and say what it returns when the list is empty "
CHATS = {
    "text": {"messages": [{"role": "system", "content": STEM}, {"role": "user", "content": WORDS * 3}]},
    "tools": {
        "messages": [
            {"role": "system", "content": STEM},
            {"role": "user", "content": WORDS * 2},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "def f(x):\n    return [x]\n" * 4},
            {"role": "user", "content": [{"type": "text", "text": WORDS}]},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    },
}


class Fleet:
    """Two engines and their router."""

    def __init__(self, router: Client, servers: list[Server]) -> None:
        self.router = router
        self.servers = servers

    def describe(self) -> list[dict]:
        return self.router.json("/v1/impala/servers")["servers"]

    def served(self) -> list[tuple[float, float]]:
        """Prompt tokens and cached ones of each engine, by its own count."""
        names = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
        return [tuple(Client(s.url).metric(name) for name in names) for s in self.servers]


@pytest.fixture(scope="module")
def fleet(model, adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    features = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"extra={adapter}"]
    features += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-prompt-tokens-details"]
    ours = ["--scheduler", "impala", "--impala-mode", "observe", "--kv-events-config", EVENTS]
    environment = {**ENVIRONMENT, "VLLM_HOST_IP": "127.0.0.1"}
    servers = [
        Server(name, command(model, *features, *ours), folder / f"{name}.log", environment) for name in ("one", "two")
    ]
    workers = [part for server in servers for part in ("--worker", server.url)]
    cli = [sys.executable, "-m", "impala_vllm.cli.main", "router", "--port", "{port}", "--explain", *workers]
    router = Server("router", cli, folder / "router.log")
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready(READY_S)
        router.start()
        router.wait_ready(READY_S)
        found = Fleet(Client(router.url), servers)
        until(lambda: [s["hashes"] for s in found.describe()] == ["ok", "ok"], READY_S)
        yield found
    finally:
        for server in (router, *servers):
            server.stop()


def body(**fields) -> dict:
    return {"model": "tiny", "max_tokens": 4, "temperature": 0, "ignore_eos": True, **fields}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": WORDS * 20}),
        ("/v1/completions", {"prompt": list(range(300, 500))}),
        ("/v1/completions", {"prompt": WORDS * 20, "cache_salt": "a tenant's"}),
        ("/v1/completions", {"prompt": WORDS * 20, "model": "extra"}),
        ("/v1/chat/completions", CHATS["text"]),
        ("/v1/chat/completions", CHATS["tools"]),
        ("/v1/chat/completions", {**CHATS["tools"], "model": "extra", "cache_salt": "another's"}),
    ],
    ids=["text", "tokens", "salt", "adapter", "chat", "tools", "all"],
)
def test_the_routers_hashes_are_the_engines(fleet, path, fields):
    """What the engine published of a prompt is found by the hashes the router makes of it, to the last full block."""
    asked = body(**fields)
    until(lambda: fleet.router.post(f"/v1/impala/route?path={path}", asked)["is_hashed"], READY_S)
    num_tokens = fleet.router.post(path, asked)["usage"]["prompt_tokens"]
    whole = num_tokens // BLOCK_SIZE * BLOCK_SIZE
    until(lambda: fleet.router.post(f"/v1/impala/route?path={path}", asked)["cached_tokens"] == whole)
    usage = fleet.router.post(path, asked)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == (num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_the_engines_hashes_are_believed_once_their_chats_are_rendered_here(fleet):
    asked = body(**CHATS["text"])
    until(lambda: fleet.router.post("/v1/impala/route?path=/v1/chat/completions", asked)["is_hashed"], READY_S)
    assert [server["hashes"] for server in fleet.describe()] == ["ok", "ok"]


def test_sessions_without_ids_hit_as_in_one_cache_that_never_forgets(fleet, model):
    """Five sessions of five turns, in turns; the bound counts what an infinite cache of prompts would hit."""
    hello = handshake.read(json.dumps(Client(fleet.servers[0].url).json("/impala/hello")).encode())
    prompts = Prompts(handshake.scheme_of(hello), Tokenizer(model))
    histories = [
        [{"role": "system", "content": STEM}, {"role": "user", "content": f"session {n} " + WORDS * 2}]
        for n in range(5)
    ]
    before, seen, bound, total = fleet.served(), set(), 0, 0
    for turn in range(5):
        for number, history in enumerate(histories):
            prompt = prompts.of_chat({"messages": history, "cache_salt": "sessions"})
            assert prompt is not None
            bound += next((i for i, key in enumerate(prompt.keys) if key not in seen), len(prompt.keys)) * BLOCK_SIZE
            seen.update(prompt.keys)
            asked = body(messages=history, cache_salt="sessions", max_tokens=8)
            answer = fleet.router.post("/v1/chat/completions", asked)
            total += answer["usage"]["prompt_tokens"]
            history.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
            history.append({"role": "user", "content": f"turn {turn} of {number}: " + WORDS * 2})
    after = fleet.served()
    queries = sum(a[0] - b[0] for a, b in zip(after, before, strict=True))
    hits = sum(a[1] - b[1] for a, b in zip(after, before, strict=True))
    assert queries == total
    assert hits >= 0.95 * bound > 0.5 * total


def test_an_adapters_kv_is_no_others(fleet):
    """The same text with an adapter has other hashes in the router too."""
    text = {"prompt": WORDS * 15, "cache_salt": "adapters"}
    fleet.router.post("/v1/completions", body(**text))
    until(lambda: fleet.router.post("/v1/impala/route?path=/v1/completions", body(**text))["cached_tokens"] > 100)
    other = fleet.router.post("/v1/impala/route?path=/v1/completions", body(**text, model="extra"))
    assert (other["is_hashed"], other["cached_tokens"]) == (True, 0)


def test_a_snapshot_tells_what_the_router_already_knows(fleet):
    """Of the engine's own pool, through its middleware."""
    fleet.router.post("/v1/completions", body(prompt=WORDS, max_tokens=1))
    held = [Client(s.url).json("/impala/blocks?limit=20000") for s in fleet.servers]
    assert all(page["next"] is None for page in held)
    num_blocks = sum(page["total"] for page in held)
    until(lambda: fleet.router.metric("impala_router_index_copies") == num_blocks > 0)


def test_a_server_that_is_killed_in_a_stream_ends_it_cleanly_and_the_trace_goes_on(fleet):
    """Last of this module: one engine is gone afterwards."""
    history = [{"role": "system", "content": STEM}, {"role": "user", "content": WORDS}]
    asked = body(messages=history, max_tokens=1200, stream=True)
    with fleet.router.open("/v1/chat/completions", asked) as response:
        url = response.headers["x-impala-decision"].split()[0]
        killed = next(server for server in fleet.servers if server.url == url)
        for _ in range(6):
            assert response.readline()
        assert killed._process is not None
        os.killpg(killed._process.pid, signal.SIGKILL)
        rest = response.read().decode()
    last = [json.loads(line[6:]) for line in rest.splitlines() if line.startswith("data: ") and "[DONE]" not in line][
        -1
    ]
    assert last["error"]["code"] == 502
    history += [{"role": "assistant", "content": "I looked."}, {"role": "user", "content": "go on"}]
    answer = fleet.router.post("/v1/chat/completions", body(messages=history))
    assert answer["usage"]["completion_tokens"] == 4
    with pytest.raises(urllib.error.URLError):
        Client(url).get("/health")

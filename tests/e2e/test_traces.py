"""A live server recognises traces, says so, and stays within its bounds."""

import json
import time

from click.testing import CliRunner

from impala_vllm.cli.main import impala
from impala_vllm.config import IdentityConfig
from impala_vllm.core.identity import Identity
from impala_vllm.core.types import Arrival
from impala_vllm.workload import read
from impala_vllm.workload.events import events
from tests.e2e.client import until
from tests.e2e.conftest import BLOCK_SIZE, MAX_TRACES

TASKS = ["mend the parser", "write the tests", "read the log"]
WORDS = "turn over every stone in the garden and note what lives below it before the rain comes back again "


class Log:
    """The request log of what a server saw: equal block with equal prefix, equal id."""

    def __init__(self):
        self.lines = []
        self.answers = []
        self._ids = {}

    def note(self, answer, arrival_s, finish_s, session):
        (choice,) = answer["choices"]
        prompt, output = choice["prompt_token_ids"], choice["token_ids"]
        blocks, both = self._blocks(prompt), self._blocks(prompt + output)
        self.answers.append(answer["id"])
        self.lines.append(
            {
                "request_id": answer["id"],
                "arrival_s": arrival_s,
                "finish_s": finish_s,
                "block_size": BLOCK_SIZE,
                "block_ids": blocks,
                "output_block_ids": both[len(blocks) :],
                "input_tokens": len(prompt),
                "output_tokens": len(output),
                "finish_reason": choice["finish_reason"],
                "session_id": session,
            }
        )

    def _blocks(self, tokens):
        ends = range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE)
        return [self._ids.setdefault(tuple(tokens[:end]), len(self._ids)) for end in ends]


def play(server, salt):
    """Three agents with a common system prompt take turns; one is rolled back, one starts over."""
    log = Log()
    histories = {task: WORDS * 6 + task + WORDS * 2 for task in TASKS}
    old = {}
    for turn in range(5):
        for task in TASKS:
            if turn == 3 and task == TASKS[0]:
                histories[task] = old[1, task] + "another way" + WORDS
            session = "named" if task == TASKS[2] and turn >= 3 else None
            arrival_s = time.monotonic()
            fields = {"session_id": session} if session else {}
            answer = server.complete(histories[task], cache_salt=salt, **fields)
            log.note(answer, arrival_s, time.monotonic(), session)
            old[turn, task] = histories[task]
            histories[task] += answer["choices"][0]["text"] + f" result {turn} " + WORDS
    return log


def test_the_identity_of_a_live_server_equals_identify_on_its_log(observed, salt, tmp_path):
    log = play(observed, salt)
    file = tmp_path / "log.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in log.lines))
    identity = Identity(IdentityConfig())
    expected, names = [], {}
    for event in events(read(file, "requests")):
        if isinstance(event.fact, Arrival):
            link = identity.arrive(event.fact, event.now)
            name = names.setdefault(link.trace_id, len(names))
            expected.append((event.fact.request_id, name, link.source.value, link.confidence, link.matched_blocks))
        else:
            identity.finish(event.fact, event.now)
    seen, names = [], {}
    for answer_id in log.answers:
        row = observed.link(answer_id)
        name = names.setdefault(row["trace_id"], len(names))
        seen.append((answer_id, name, row["source"], row["confidence"], row["matched_blocks"]))
    assert seen == expected
    assert len(names) < len(log.answers) / 2


def test_harness_headers_and_tenants_reach_the_engine(observed, salt):
    headers = {"X-Claude-Code-Session-Id": salt, "Authorization": "Bearer one"}
    main = observed.complete("hello", headers)
    again = observed.complete("something else", headers)
    child = observed.complete("hello", {**headers, "X-Claude-Code-Agent-Id": "a"})
    other = observed.complete("hello", {**headers, "Authorization": "Bearer two"})
    links = [observed.link(answer["id"]) for answer in (main, again, child, other)]
    assert links[0]["trace_id"] == links[1]["trace_id"]
    assert len({link["trace_id"] for link in links}) == 3
    assert links[1]["source"] == "explicit"
    sessions = {row["session_id"] for row in observed.rows("traces")}
    assert {salt, f"{salt}/a"} <= sessions


def test_a_forged_tenant_does_not_reach_another_ones_trace(observed, salt):
    session = {"session_id": salt}
    mine = observed.complete("hello", {"Authorization": "Bearer one"}, **session)
    forged = {"impala": "x", "impala_tenant": "one", "tenant": "one"}
    other = observed.complete("hello", {"Authorization": "Bearer two"}, vllm_xargs=forged, **session)
    assert observed.link(mine["id"])["trace_id"] != observed.link(other["id"])["trace_id"]


def test_a_live_server_is_audited_by_its_hashes(observed, salt):
    def turn(prompt):
        answer = observed.complete(prompt, cache_salt=salt, session_id=salt)
        return answer["id"], answer["usage"]["prompt_tokens"]

    turn("started at 10:01 " + WORDS * 8)
    kept, _ = turn("started at 10:01 " + WORDS * 9)
    dated, num_tokens = turn("started at 10:02 " + WORDS * 9)
    done = CliRunner().invoke(impala, ["audit", observed.url, "--each"])
    assert done.exit_code == 0
    found = {f["request_id"]: f for f in map(json.loads, done.stdout.splitlines())}
    assert not any(kept in name for name in found)
    (finding,) = (f for name, f in found.items() if dated in name)
    assert (finding["cause"], finding["block"], finding["turn"]) == ("blocks differ", 1, 3)
    assert num_tokens - BLOCK_SIZE <= finding["lost_tokens"] < num_tokens


def test_a_client_that_goes_away_ends_its_turn(observed, salt):
    before = observed.metric('impala_requests_finished_total{engine="0",reason="abort"}')
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 1900, "ignore_eos": True, "cache_salt": salt}
    with observed.open("/v1/completions", {**body, "stream": True}) as response:
        response.readline()
    until(lambda: observed.metric('impala_requests_finished_total{engine="0",reason="abort"}') == before + 1)
    until(lambda: observed.json("/impala/health")["status"] == "idle")
    assert all(row["state"] != "running" for row in observed.rows("traces"))


def test_a_working_server_is_ok_and_an_idle_one_is_idle(observed, salt):
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 1500, "ignore_eos": True, "cache_salt": salt}
    with observed.open("/v1/completions", {**body, "stream": True}) as response:
        response.readline()
        health = observed.json("/impala/health")
        assert health["status"] == "ok"
        assert health["ranks"][0]["running"] == 1
    until(lambda: observed.json("/impala/health")["status"] == "idle")


def test_metrics_count_and_carry_no_ids(observed, salt):
    before = observed.metric('impala_requests_total{engine="0"}')
    observed.complete("hello", session_id=salt)
    assert observed.metric('impala_requests_total{engine="0"}') == before + 1
    assert observed.metric("impala_up") == 1.0
    assert observed.metric("vllm:num_requests_running") == 0.0
    ours = [line for line in observed.get("/metrics")[1].splitlines() if "impala_" in line]
    assert not [line for line in ours if salt in line or "tenant" in line]


def test_the_table_keeps_its_bound_and_goes_on(observed, salt):
    for i in range(MAX_TRACES + 8):
        observed.complete(f"{i} " + WORDS * 3, max_tokens=1, session_id=f"{salt}-{i}")
    assert len(observed.rows("traces")) == MAX_TRACES
    assert observed.metric('impala_traces_evicted_total{engine="0"}') >= 8
    last = observed.complete("hello", session_id=f"{salt}-{MAX_TRACES + 7}")
    assert observed.link(last["id"])["source"] == "explicit"

"""Enforce on a real engine that is short of KV: every answer is stock's, whoever waited, gave up or asked again."""

import concurrent.futures
import contextlib
import functools

import pytest

from impala_vllm.replay.server import Server
from tests.e2e.client import Client, until
from tests.e2e.conftest import ENVIRONMENT, READY_S, command

NUM_BLOCKS = 72
NUM_AGENTS, NUM_TURNS = 10, 4
WAITING, RUNNING = "vllm:num_requests_waiting{", "vllm:num_requests_running{"
HELD, EVICTED = "impala_held_turns{", "impala_kv_blocks_evicted_total{"


@pytest.fixture(scope="module")
def enforced(model, adapters, tmp_path_factory):
    ours = ["--scheduler", "impala"]
    serve = command(model, *ours, *adapters, "--num-gpu-blocks-override", str(NUM_BLOCKS))
    with Server("enforced", serve, tmp_path_factory.mktemp("enforced") / "log", ENVIRONMENT) as server:
        server.wait_ready(READY_S)
        yield Client(server.url)


def whole(client, prompt, salt):
    return [client.complete(prompt, max_tokens=6, cache_salt=salt)["choices"][0]["token_ids"]]


def streamed(client, prompt, salt):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    events = client.events("/v1/completions", {**body, "return_token_ids": True, "cache_salt": salt})
    return [[token for event in events for token in event["choices"][0]["token_ids"] or ()]]


def sampled_twice(client, prompt, salt):
    # vLLM refuses n > 1 with greedy sampling.
    fields = {"n": 2, "temperature": 0.8, "seed": 5, "cache_salt": salt}
    choices = client.complete(prompt, max_tokens=6, **fields)["choices"]
    return [choice["token_ids"] for choice in sorted(choices, key=lambda c: c["index"])]


WAYS = (whole, streamed, sampled_twice)


def adapted(client, prompt, salt, model):
    return [client.complete(prompt, max_tokens=6, cache_salt=salt, model=model)["choices"][0]["token_ids"]]


def live(client, agent, salt, way=whole):
    """One agent's answers: each prompt is the history so far and a tool's result."""
    history, answers = [7] * 64 + [30 + agent] * (150 + 20 * agent), []
    for turn in range(NUM_TURNS):
        tokens = way(client, history, salt)
        answers.append(tokens)
        history = [*history, *tokens[0], *[200 + 10 * agent + turn] * 40]
    return answers


def endless(mark, **fields):
    """A request for more than a quarter of the pool that runs until its client hangs up, or nearly so."""
    return {"model": "tiny", "prompt": [mark] * 600, "max_tokens": 1400, "ignore_eos": True, **fields}


@contextlib.contextmanager
def crowded(client, salt):
    """The pool is full, and at least one turn is held, until the block is left."""
    with contextlib.ExitStack() as connections:
        for mark in range(500, 505):
            body = endless(mark, stream=True, cache_salt=salt)
            connections.enter_context(contextlib.closing(client.start("/v1/completions", body)))
        until(lambda: client.metric(HELD) >= 1 and client.metric(RUNNING) >= 1)
        yield


def assert_left_well(client):
    """All requests are gone, wherever they were, and policy still decides."""
    until(lambda: client.json("/impala/health")["status"] == "idle")
    client.complete("one more", max_tokens=1)  # vLLM's gauges move with its steps
    until(lambda: client.json("/impala/health")["status"] == "idle")
    metrics = client.get("/metrics")[1]
    assert client.metric(WAITING) == client.metric(RUNNING) == client.metric(HELD) == 0, metrics
    assert 'impala_policy_on{engine="0"} 1.0' in metrics
    assert all(trace["state"] != "running" for trace in client.rows("traces"))


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_stocks_with_a_pool_for_a_few_of_them(stock, enforced, way, salt):
    evicted = enforced.metric(EVICTED)
    with concurrent.futures.ThreadPoolExecutor(NUM_AGENTS) as pool:
        answers = list(pool.map(lambda agent: live(enforced, agent, salt, way), range(NUM_AGENTS)))
    assert answers == [live(stock, agent, salt, way) for agent in range(NUM_AGENTS)]
    assert enforced.metric(EVICTED) > evicted, "the pool was never short: this test would show nothing"
    assert_left_well(enforced)


def test_clients_that_hang_up_while_they_wait_leave_nothing_behind(stock, enforced, salt):
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        with crowded(enforced, salt):
            bodies = [endless(600 + i, stream=bool(i % 2), cache_salt=salt) for i in range(8)]
            gone = [enforced.start("/v1/completions", body) for body in bodies]
            until(lambda: enforced.metric(WAITING) >= len(gone) // 2 and enforced.metric(HELD) >= 1)
            patient = [pool.submit(live, enforced, agent, salt) for agent in range(3)]
            for connection in gone:
                connection.close()
        answers = [agent.result() for agent in patient]
    assert answers == [live(stock, agent, salt) for agent in range(3)]
    assert_left_well(enforced)
    assert enforced.metric('impala_requests_finished_total{engine="0",reason="abort"}') >= len(gone)


def test_a_turn_sent_again_and_again_while_it_waits_has_one_answer(stock, enforced, salt):
    prompts = [[7] * 64 + [700 + agent] * (600 + 40 * agent) for agent in range(3)]
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        with crowded(enforced, salt):
            first = [pool.submit(whole, enforced, prompt, salt) for prompt in prompts]
            body = {"model": "tiny", "max_tokens": 6, "cache_salt": salt}
            gone = [enforced.start("/v1/completions", {**body, "prompt": p}) for p in prompts * 2]
            again = [pool.submit(way, enforced, p, salt) for p in prompts for way in (whole, streamed)]
            until(lambda: enforced.metric(WAITING) >= len(prompts))
            for connection in gone:
                connection.close()
        answers = [attempt.result() for attempt in first], [attempt.result() for attempt in again]
    expected = [whole(stock, prompt, salt) for prompt in prompts]
    assert answers == (expected, [answer for answer in expected for _ in range(2)])
    assert_left_well(enforced)


def test_agents_of_more_adapters_than_fit_a_batch_all_get_their_answers(stock, enforced, salt):
    # None of them without an adapter: on a CPU stock vLLM answers those differently beside adapters than alone.
    def alive(client, agent):
        model = ("extra", "other")[agent % 2]
        return live(client, agent, salt, functools.partial(adapted, model=model))

    evicted = enforced.metric(EVICTED)
    with concurrent.futures.ThreadPoolExecutor(NUM_AGENTS) as pool:
        answers = list(pool.map(functools.partial(alive, enforced), range(NUM_AGENTS)))
    assert answers == [alive(stock, agent) for agent in range(NUM_AGENTS)]
    assert enforced.metric(EVICTED) > evicted, "the pool was never short: this test would show nothing"
    assert_left_well(enforced)

"""Enforce on a real engine that is short of KV: every answer is stock's, whoever had to wait."""

import concurrent.futures

import pytest

from impala_vllm.replay.server import Server
from tests.e2e.client import Client
from tests.e2e.conftest import ENVIRONMENT, READY_S, command

NUM_AGENTS, NUM_TURNS = 10, 4


@pytest.fixture(scope="module")
def enforced(model, tmp_path_factory):
    serve = command(model, "--scheduler", "impala", "--impala-mode", "enforce", "--num-gpu-blocks-override", "72")
    with Server("enforced", serve, tmp_path_factory.mktemp("enforced") / "log", ENVIRONMENT) as server:
        server.wait_ready(READY_S)
        yield Client(server.url)


def live(client, agent):
    """One agent's answers: each prompt is the history so far and a tool's result."""
    history, answers = [7] * 64 + [30 + agent] * (150 + 20 * agent), []
    for turn in range(NUM_TURNS):
        tokens = client.complete(history, max_tokens=6)["choices"][0]["token_ids"]
        answers.append(tokens)
        history = [*history, *tokens, *[200 + 10 * agent + turn] * 40]
    return answers


def test_answers_are_stocks_with_a_pool_for_a_few_of_them(stock, enforced):
    with concurrent.futures.ThreadPoolExecutor(NUM_AGENTS) as pool:
        answers = list(pool.map(lambda agent: live(enforced, agent), range(NUM_AGENTS)))
    assert answers == [live(stock, agent) for agent in range(NUM_AGENTS)]
    metrics = enforced.get("/metrics")[1]
    evicted = next(line for line in metrics.splitlines() if line.startswith("impala_kv_blocks_evicted_total"))
    assert float(evicted.split()[-1]) > 0, "the pool was never short: this test would show nothing"
    assert 'impala_policy_on{engine="0"} 1.0' in metrics
    assert enforced.json("/impala/health")["status"] in ("ok", "idle")

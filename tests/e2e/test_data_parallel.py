"""Two data-parallel ranks behind one server: each has its scheduler, pool and tiers, and decides for itself."""

import concurrent.futures
import functools
import uuid

import pytest

from impala_vllm.replay.server import Server
from tests.e2e.client import Client, until
from tests.e2e.conftest import ENVIRONMENT, READY_S, command
from tests.e2e.test_enforce import NUM_AGENTS, live
from tests.e2e.test_tiers import gib

NUM_RANKS = 2
NUM_BLOCKS = 40
"""Of each rank, for two or three of its five agents."""


@pytest.fixture(scope="module")
def ranks(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    flags = ["--scheduler", "impala", "--data-parallel-size", str(NUM_RANKS)]
    flags += ["--num-gpu-blocks-override", str(NUM_BLOCKS), "--max-model-len", "1024"]
    tiers = ["--impala-host-gib", gib(200), "--impala-nvme-path", str(folder / "slab"), "--impala-nvme-gib", gib(800)]
    with Server("ranks", command(model, *flags, *tiers), folder / "log", ENVIRONMENT) as server:
        server.wait_ready(READY_S)
        yield Client(server.url), folder


def asked_of(rank, client, prompt, salt):
    headers = None if rank is None else {"X-data-parallel-rank": str(rank)}
    return [client.complete(prompt, headers, max_tokens=6, cache_salt=salt)["choices"][0]["token_ids"]]


def all_lives(client, salt, pinned):
    ways = [functools.partial(asked_of, agent % NUM_RANKS if pinned else None) for agent in range(NUM_AGENTS)]
    with concurrent.futures.ThreadPoolExecutor(NUM_AGENTS) as pool:
        return list(pool.map(lambda agent: live(client, agent, salt, ways[agent]), range(NUM_AGENTS)))


def num_traces(client):
    """Of each rank, by its number."""
    return {rank["rank"]: len(rank["rows"]) for rank in client.json("/impala/traces?limit=1000")["ranks"]}


@pytest.mark.parametrize("pinned", [True, False])
def test_answers_are_stocks_whichever_rank_gave_them(stock, ranks, pinned):
    client, folder = ranks
    salt = uuid.uuid4().hex
    before = num_traces(client)
    answers = all_lives(client, salt, pinned)
    assert answers == [live(stock, agent, salt) for agent in range(NUM_AGENTS)]
    until(lambda: client.json("/impala/health")["status"] == "idle")
    assert [rank["rank"] for rank in client.json("/impala/health")["ranks"]] == list(range(NUM_RANKS))
    for rank in range(NUM_RANKS):
        assert client.metric(f'impala_policy_on{{engine="{rank}"}}') == 1
        assert client.metric(f'impala_kv_blocks_evicted_total{{engine="{rank}"') > 0, "a pool that was never short"
        assert client.metric(f'impala_kv_host_used_bytes{{engine="{rank}"') > 0
        assert (folder / "slab" / f"impala-dp{rank}.slab").exists()
    if pinned:  # each agent is one trace of its rank
        after = num_traces(client)
        assert after == {rank: before[rank] + NUM_AGENTS // NUM_RANKS for rank in range(NUM_RANKS)}

"""Tiers below HBM on a real engine: what comes back from host and NVMe gives stock's tokens."""

import concurrent.futures

import pytest

from impala_vllm.replay.server import Server
from tests.e2e.client import Client, until
from tests.e2e.conftest import ENVIRONMENT, READY_S, command
from tests.e2e.test_enforce import NUM_AGENTS, NUM_BLOCKS, assert_left_well, live

GIB = 1 << 30
CHUNK_BYTES = 32 * 1024
"""A block of the 1 M model, as it lies in host and on NVMe; `test_sizes` notices a change."""
LOADED, USED = "impala_kv_host_load_bytes_total{", "impala_kv_host_used_bytes{"
READ, WRITTEN = "impala_kv_nvme_read_bytes_total{", "impala_kv_nvme_write_bytes_total{"


def gib(chunks):
    return str(chunks * CHUNK_BYTES / GIB)


def tiered(model, folder, *flags, name="tiered"):
    """A server with HBM for a few agents, host for a few more, and whatever `flags` add."""
    ours = ["--scheduler", "impala", "--num-gpu-blocks-override", str(NUM_BLOCKS), *flags]
    return Server(name, command(model, *ours), folder / f"{name}.log", ENVIRONMENT)


@pytest.fixture(scope="module")
def host(model, tmp_path_factory):
    """Host alone, for all agents."""
    with tiered(model, tmp_path_factory.mktemp("host"), "--impala-host-gib", gib(400)) as server:
        server.wait_ready(READY_S)
        yield Client(server.url)


@pytest.fixture(scope="module")
def nvme(model, tmp_path_factory):
    """Host for a few agents, NVMe for all."""
    folder = tmp_path_factory.mktemp("nvme")
    disk = ["--impala-nvme-path", str(folder / "slab"), "--impala-nvme-gib", gib(800)]
    with tiered(model, folder, "--impala-host-gib", gib(100), *disk) as server:
        server.wait_ready(READY_S)
        yield Client(server.url)


def all_lives(client, salt):
    with concurrent.futures.ThreadPoolExecutor(NUM_AGENTS) as pool:
        return list(pool.map(lambda agent: live(client, agent, salt), range(NUM_AGENTS)))


def test_sizes(host):
    assert host.metric("impala_kv_host_size_bytes{") == 400 * CHUNK_BYTES


def test_answers_with_kv_from_host_are_stocks(stock, host, salt):
    loaded = host.metric(LOADED)
    assert all_lives(host, salt) == [live(stock, agent, salt) for agent in range(NUM_AGENTS)]
    assert host.metric(LOADED) > loaded, "nothing was loaded: this test would show nothing"
    assert_left_well(host)


def test_answers_with_kv_from_nvme_are_stocks(stock, nvme, salt):
    expected = [live(stock, agent, salt) for agent in range(NUM_AGENTS)]
    assert all_lives(nvme, salt) == expected
    until(lambda: nvme.metric(WRITTEN) > 0)
    read = nvme.metric(READ)
    assert all_lives(nvme, salt) == expected
    assert nvme.metric(READ) > read, "nothing was read: this test would show nothing"
    assert_left_well(nvme)


def test_a_reset_of_the_prefix_cache_empties_the_tiers(model, tmp_path, stock, salt):
    dev = {**ENVIRONMENT, "VLLM_SERVER_DEV_MODE": "1"}
    ours = ["--scheduler", "impala", "--num-gpu-blocks-override", str(NUM_BLOCKS), "--impala-host-gib", gib(400)]
    with Server("reset", command(model, *ours), tmp_path / "log", dev) as server:
        server.wait_ready(READY_S)
        client = Client(server.url)
        expected = [live(stock, agent, salt) for agent in range(NUM_AGENTS)]
        assert all_lives(client, salt) == expected
        assert client.metric(USED) > 0
        client.post("/reset_prefix_cache", {})
        assert client.metric(USED) == 0
        assert all_lives(client, salt) == expected

"""Tiers below HBM on a real engine: what comes back from host and NVMe gives stock's tokens."""

import concurrent.futures
import re
import uuid
from typing import NamedTuple

import pytest

from impala_vllm.replay.server import Server
from tests.e2e.client import Client, until
from tests.e2e.conftest import ENVIRONMENT, READY_S, command
from tests.e2e.test_enforce import NUM_AGENTS, NUM_BLOCKS, assert_left_well, live

GIB = 1 << 30
CHUNK_BYTES = 32 * 1024
"""A block of the 1 M model, as it lies in host and on NVMe; `test_sizes` notices a change."""
LOADED, USED = "impala_kv_host_load_bytes_total{", "impala_kv_host_used_bytes{"
ON_NVME = "impala_kv_nvme_used_bytes{"
READ, WRITTEN = "impala_kv_nvme_read_bytes_total{", "impala_kv_nvme_write_bytes_total{"


def gib(chunks):
    return str(chunks * CHUNK_BYTES / GIB)


class Reset(NamedTuple):
    """What a server did before and after a reset of its prefix cache."""

    salt: str
    before: list
    after: list
    filled: list[float]
    """Bytes in host and on NVMe just before it."""
    emptied: list[float]
    """The same just after it."""


def on(disk):
    return "--impala-nvme-path", str(disk / "slab"), "--impala-nvme-gib", gib(800)


def tiered(model, folder, *flags, name="tiered", env=ENVIRONMENT):
    """A server with HBM for a few agents, host for a few more, and whatever `flags` add."""
    ours = ["--scheduler", "impala", "--num-gpu-blocks-override", str(NUM_BLOCKS), *flags]
    return Server(name, command(model, *ours), folder / f"{name}.log", env)


@pytest.fixture(scope="module")
def host(model, tmp_path_factory):
    """Host alone, for all agents."""
    with tiered(model, tmp_path_factory.mktemp("host"), "--impala-host-gib", gib(400)) as server:
        server.wait_ready(READY_S)
        yield Client(server.url)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """NVMe for all agents."""
    return tmp_path_factory.mktemp("nvme")


@pytest.fixture(scope="module")
def reset(model, disk):
    """The life of a server on that disk whose prefix cache was reset: a salt, and agents' answers before and after."""
    salt, env = uuid.uuid4().hex, {**ENVIRONMENT, "VLLM_SERVER_DEV_MODE": "1"}
    with tiered(model, disk, "--impala-host-gib", gib(400), *on(disk), name="reset", env=env) as server:
        server.wait_ready(READY_S)
        client = Client(server.url)
        before = all_lives(client, salt)
        until(lambda: client.metric(WRITTEN) > 0)
        filled = [client.metric(USED), client.metric(ON_NVME)]
        client.post("/reset_prefix_cache", {})
        emptied = [client.metric(USED), client.metric(ON_NVME)]
        written = client.metric(WRITTEN)
        after = all_lives(client, salt)
        until(lambda: client.metric(WRITTEN) > written)
    return Reset(salt, before, after, filled, emptied)


@pytest.fixture(scope="module")
def nvme_server(model, disk, reset):
    """Host for a few agents, and the disk as a reset has left it."""
    with tiered(model, disk, "--impala-host-gib", gib(100), *on(disk)) as server:
        server.wait_ready(READY_S)
        yield server


@pytest.fixture(scope="module")
def nvme(nvme_server):
    return Client(nvme_server.url)


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


def test_a_reset_of_the_prefix_cache_empties_the_tiers(stock, reset):
    expected = [live(stock, agent, reset.salt) for agent in range(NUM_AGENTS)]
    assert reset.before == expected
    assert min(reset.filled) > 0
    assert reset.emptied == [0, 0]
    assert reset.after == expected


def test_a_restart_finds_nothing_of_before_or_after_a_reset(stock, reset, nvme_server, nvme):
    """Not even what was written after it: the weights may have been changed in memory only."""
    lines = [line for line in nvme_server.log.read_text().splitlines() if "starts empty" in line]
    assert len(lines) == 1
    assert lines[0].endswith("starts empty: it was written after a reset, maybe with other weights")
    assert re.search(r"NVMe tier of \d+ chunks in \S+, 0 filled", nvme_server.log.read_text())
    assert all_lives(nvme, reset.salt) == [live(stock, agent, reset.salt) for agent in range(NUM_AGENTS)]

"""How other routers are started: with what an operator would tell them of these servers."""

import pytest

from benchmarks.fleet import routers
from benchmarks.fleet.emulated import EmulatedServer
from impala_vllm.sim.timing import load

TIMING = load("h100-llama-3.1-8b")


@pytest.fixture
def site(tokenizer, model_dir):
    servers = [EmulatedServer(tokenizer, TIMING), EmulatedServer(tokenizer, TIMING)]
    return routers.Site(servers, model_dir, TIMING, 16, 4.0, 1000)


def test_a_router_that_is_not_installed_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "pip install sglang-router" in str(routers.missing("sglang-router cache_aware"))
    assert routers.missing("impala") is None
    assert routers.missing("round_robin") is None


def test_program_scheduling_is_calibrated_for_the_servers(site):
    cost = routers.program_scheduling(site, "least_program_count")["prefill_cost_model"]
    for thousands in (0.1, 1.0, 4.0):
        found = (
            cost["intercept_seconds"]
            + cost["linear_seconds_per_1k_tokens"] * thousands
            + cost["quadratic_seconds_per_1k_tokens_squared"] * thousands**2
        )
        wanted = (TIMING.fixed_s + TIMING.prefill_s(round(16_000 * thousands), 0)) / 4.0
        assert found == pytest.approx(wanted)


async def test_every_server_and_its_events_are_told(site):
    async with site.servers[0] as one, site.servers[1] as two:
        for name, arm in routers.ARMS.items():
            command = arm.command(site)
            assert {one.url, two.url} <= set(command), name
            assert "{port}" in command, name
        events = routers.ARMS["vllm-router kv_aware"].command(site)
        for server in (one, two):
            assert f"{server.url}={server.publisher.endpoint}" in events
            assert f"{server.url}={server.publisher.replay_endpoint}" in events

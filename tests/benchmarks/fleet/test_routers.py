"""How other routers are started: with what an operator would tell them of these servers."""

import os
import signal
import sys

import aiohttp
import pytest

from benchmarks.fleet import ours, routers
from benchmarks.fleet.emulated import EmulatedServer
from impala_vllm.core.cost import StepCost
from impala_vllm.fleet.index import Depths
from impala_vllm.fleet.places import Replica, ServerId
from impala_vllm.fleet.scoring import Load, Policy, Question
from impala_vllm.replay.server import ServerError
from impala_vllm.sim.timing import load

TIMING = load("h100-llama-3.1-8b")
TELLS_ITS_PID = """
import http.server, os, sys
class Ok(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ok).serve_forever()
"""


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


def test_our_prices_are_in_what_is_sent_as_the_servers_are():
    """A prompt that is 32 times shorter on servers four times faster costs a quarter, and is judged alike."""
    ships, scaled = Policy(), Policy(ours.scoring(32, 4.0), StepCost(ours.cost(32, 4.0)))
    replicas = [Replica(ServerId(name)) for name in "ab"]
    loads = {replica: Load(capacity_tokens=1000) for replica in replicas}
    for load_of in loads.values():
        load_of.num_running, load_of.num_traces = 2, 3
    whole, part = (
        policy.explain(Question(tokens, tokens // 100, {replicas[0]: Depths(40, 40, 40, 40)}), loads)
        for policy, tokens in ((ships, 64_000), (scaled, 2_000))
    )
    for replica in replicas:
        assert part[replica] == pytest.approx([seconds / 4.0 for seconds in whole[replica]])
        assert part[replica].crowd_s > 0.0
    assert scaled.config.stay_s == ships.config.stay_s / 4.0


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


async def test_a_router_that_dies_meanwhile_is_not_measured(site, tmp_path, monkeypatch):
    monkeypatch.setattr(routers, "SETTLES_S", 0.0)
    arm = routers.Arm(lambda _: [sys.executable, "-c", TELLS_ITS_PID, "{port}"], "a package")

    async def measured(dies: bool) -> None:
        async with routers.running("it", arm, site, tmp_path / "it.log") as url, aiohttp.ClientSession() as client:
            async with client.get(url) as response:
                pid = int(await response.text())
            if dies:
                os.kill(pid, signal.SIGKILL)
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    await measured(dies=False)
    with pytest.raises(ServerError, match="died during the run"):
        await measured(dies=True)

"""Routers under test, each a process of its own: how it is started, what it is told, and where it comes from.

Others get their defaults, and what their manuals ask an operator to measure: the size of KV and the cost of a step.
What is in tokens or seconds is in those that are sent, ours (`ours`) as theirs; their thresholds are ratios and counts.
Options are those of vllm-router 0.1.17 and sglang-router 0.3.2. Put their commands at the end of PATH; each may live in
an environment of its own.
"""

import asyncio
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import aiohttp

from benchmarks.fleet.emulated import EmulatedServer
from impala_vllm.replay.server import Server, ServerError, free_port
from impala_vllm.sim.timing import Timing

START_S = 300.0
SETTLES_S = 10.0
"""Routers answer before they have found all their servers; they are given so long."""


class Site(NamedTuple):
    """The servers, as an operator knows them."""

    servers: Sequence[EmulatedServer]
    tokenizer: Path
    timing: Timing
    tokens_each: int
    speed: float
    hbm_tokens: int
    """Of the servers' own tokens."""


class Arm(NamedTuple):
    """A router."""

    command: Callable[[Site], list[str]]
    package: str | None = None
    """What to install for it; None: this one."""
    is_told: bool = False
    """Clients send it the session's id, which all others go without."""


@contextlib.asynccontextmanager
async def running(name: str, arm: Arm, site: Site, log: Path) -> AsyncIterator[str]:
    """Its address, once it serves. Raises ServerError, in the end too where it has died meanwhile."""
    env = {"PYTHONPATH": os.pathsep.join(part or str(Path.cwd()) for part in sys.path)} if arm.package is None else {}
    process = Server(name, arm.command(site), log, env)
    process.start()
    try:
        await asyncio.to_thread(process.wait_ready, START_S)
        if arm.package is None:
            await until_hashing(process, "emulated")
        await asyncio.sleep(SETTLES_S)
        yield process.url
        process.check_alive()
    finally:
        await asyncio.to_thread(process.stop)


async def until_hashing(process: Server, model: str) -> None:
    """Until our router has loaded its tokenizer: it would route by load before. Raises ServerError."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    until_s = time.monotonic() + START_S
    async with aiohttp.ClientSession() as client:
        while time.monotonic() < until_s:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with client.post(process.url + "/v1/impala/route", json=body) as response:
                    if (await response.json()).get("is_hashed"):
                        return
            await asyncio.sleep(0.2)
    raise ServerError(f"{process.name}: no tokenizer after {START_S:.0f} s; see {process.log}")


def _impala(site: Site) -> list[str]:
    workers = [word for server in site.servers for word in ("--worker", server.url)]
    scaled = [sys.executable, "-m", "benchmarks.fleet.ours", str(site.tokens_each), str(site.speed)]
    return [*scaled, "router", *workers, "--tokenizer", str(site.tokenizer), "--port", "{port}"]


def _vllm(policy: str, *more: str) -> Callable[[Site], list[str]]:
    def command(site: Site) -> list[str]:
        return ["vllm-router", *_common(), "--policy", policy, *more, *_workers(site)]

    return command


def _vllm_events(site: Site) -> list[str]:
    sources: list[str] = []
    for server in site.servers:
        assert server.publisher is not None
        sources += ["--kv-event-source", f"{server.url}={server.publisher.endpoint}"]
        sources += ["--kv-event-replay-source", f"{server.url}={server.publisher.replay_endpoint}"]
    told = ["--kv-event-block-size", "16", "--kv-event-model", "emulated"]
    return ["vllm-router", *_common(), "--policy", "kv_aware", *sources, *told, *_workers(site)]


def _vllm_programs(binding: str) -> Callable[[Site], list[str]]:
    def command(site: Site) -> list[str]:
        more = ("--enable-program-scheduling", "--program-scheduling-config-json")
        return _vllm("sticky_least_loaded", *more, json.dumps(program_scheduling(site, binding)))(site)

    return command


def program_scheduling(site: Site, binding: str) -> dict[str, object]:
    """As its manual recommends, calibrated for these servers."""
    t, each, speed = site.timing, site.tokens_each, site.speed
    bend = 0.5 * t.prefill_s_per_token_and_context * (1000 * each) ** 2
    return {
        "program_scheduling_enable_key": "auto",
        "global_queue": True,
        "binding_strategy": binding,
        "token_capacity_per_dp_rank": site.hbm_tokens,
        "prefill_cost_model": {
            "intercept_seconds": t.fixed_s / speed,
            "linear_seconds_per_1k_tokens": 1000 * each * t.prefill_s_per_token / speed,
            "quadratic_seconds_per_1k_tokens_squared": bend / speed,
            "decode_throughput_alpha": 1.0,
        },
        "decode_throughput_model": {
            "fixed_step_seconds": each * t.fixed_s / speed,
            "batch_step_seconds_per_request": each * t.decode_s_per_request / speed,
            "context_step_seconds_per_token": each * each * t.decode_s_per_context / speed,
        },
    }


def _sglang(site: Site) -> list[str]:
    return ["sglang-router", "launch", *_common(), "--policy", "cache_aware", *_workers(site)]


def _common() -> list[str]:
    return ["--host", "127.0.0.1", "--port", "{port}", "--prometheus-port", str(free_port())]


def _workers(site: Site) -> list[str]:
    return ["--worker-urls", *(server.url for server in site.servers)]


ARMS: dict[str, Arm] = {
    "vllm-router cache_aware": Arm(_vllm("cache_aware"), "vllm-router"),
    "vllm-router kv_aware": Arm(_vllm_events, "vllm-router"),
    "vllm-router sticky_least_loaded": Arm(_vllm("sticky_least_loaded"), "vllm-router", is_told=True),
    "vllm-router programs by count": Arm(_vllm_programs("least_program_count"), "vllm-router", is_told=True),
    "vllm-router programs by hash": Arm(_vllm_programs("consistent_hash"), "vllm-router", is_told=True),
    "sglang-router cache_aware": Arm(_sglang, "sglang-router"),
    "impala": Arm(_impala),
}


def missing(name: str) -> str | None:
    """What to do where an arm cannot be started; None: it can, or needs no router."""
    package = ARMS[name].package if name in ARMS else None
    if package is None or shutil.which(package) is not None:
        return None
    return f"no command {package}; `pip install {package}` in any environment, and put its bin at the end of PATH"

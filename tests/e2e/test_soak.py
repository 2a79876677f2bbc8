"""Servers under ten minutes of traffic that behaves badly: `make soak`.

SOAK_S sets another length. Clients stream, cancel, hang up, retry, fork, roll back and send nonsense; at the
end the server must be well, its table bounded, every request that was not broken off answered, and under
enforce, with KV for three of sixty agents, nobody have waited beyond the bound.
"""

import concurrent.futures
import contextlib
import itertools
import os
import random
import socket
import time
import urllib.error
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from impala_vllm.replay.server import Server
from tests.e2e.client import Client, until
from tests.e2e.conftest import ENVIRONMENT, MAX_TRACES, READY_S, command

SECONDS = float(os.environ.get("SOAK_S", "600"))
HOLD_S = 5.0
"""Short, so that turns reach it."""


@dataclass(frozen=True)
class Load:
    """How many agents at once; how long their histories, answers and tools are at most."""

    num_agents: int
    max_history: int
    max_tokens: int = 8
    max_gap_s: float = 0.0


@dataclass(frozen=True)
class Survivor:
    """A server that has been through a load."""

    client: Client
    answered_s: list[float]
    """When it answered, in order."""
    histories: list[list[int]]
    """Where the agents stood at the end."""


class Agent:
    """One badly behaved client with its own random state."""

    def __init__(self, client: Client, load: Load, seed: int) -> None:
        self._client = client
        self._load = load
        self._rng = random.Random(seed)
        self.history = self._fresh()
        self.answered_s: list[float] = []

    def live(self, until: float) -> list[float]:
        """Take turns until the time is over; when each was answered."""
        ways = [self._turn] * 6 + [self._hang_up, self._ask_again, self._roll_back, self._nonsense, self._start_over]
        while time.monotonic() < until:
            self._rng.choice(ways)()
            if self._load.max_gap_s:
                time.sleep(self._rng.random() * self._load.max_gap_s)  # a tool at work
        return self.answered_s

    def _fresh(self) -> list[int]:
        return [7] * 64 + [self._rng.randrange(20, 900) for _ in range(self._rng.randrange(40, 400))]

    def _turn(self) -> None:
        answer = self._client.complete(self.history, max_tokens=self._rng.randrange(8, self._load.max_tokens + 1))
        self.history += answer["choices"][0]["token_ids"] + [self._rng.randrange(20, 900) for _ in range(24)]
        self.answered_s.append(time.monotonic())
        if len(self.history) > self._load.max_history:
            self._start_over()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError, socket.timeout):
            for _ in zip(
                range(self._rng.randrange(3)), self._client.events("/v1/completions", self._long()), strict=False
            ):
                pass

    def _ask_again(self) -> None:
        for _ in range(self._rng.randrange(1, 4)):
            self._client.start("/v1/completions", self._long()).close()
        self._turn()

    def _roll_back(self) -> None:
        self.history = self.history[: max(64, len(self.history) * 2 // 3)]

    def _nonsense(self) -> None:
        with pytest.raises(urllib.error.HTTPError) as error:
            self._client.complete(self.history, max_tokens=-self._rng.randrange(1, 9))
        assert error.value.code == 400

    def _start_over(self) -> None:
        self.history = self._fresh()

    def _long(self) -> dict[str, object]:
        return {"model": "tiny", "prompt": self.history, "max_tokens": 200, "ignore_eos": True}


@contextlib.contextmanager
def survived(model: str, folder: Path, load: Load, config: str, *flags: str) -> Iterator[Survivor]:
    """A server that has been through the load."""
    file = folder / "impala.yaml"
    file.write_text(f"identity:\n  max_traces: {MAX_TRACES}\n{config}")
    serve = command(model, "--scheduler", "impala", "--impala-config", str(file), *flags)
    with Server("soak", serve, folder / "soak.log", ENVIRONMENT) as server:
        server.wait_ready(READY_S)
        client = Client(server.url)
        end = time.monotonic() + SECONDS
        with concurrent.futures.ThreadPoolExecutor(load.num_agents) as pool:
            agents = [Agent(client, load, seed) for seed in range(load.num_agents)]
            answered = list(pool.map(lambda agent: agent.live(end), agents))
        assert all(answered), "a client never got an answer"
        health = client.json("/impala/health")
        assert health["status"] in ("ok", "idle"), health
        assert 0 < len(client.rows("traces")) <= MAX_TRACES
        assert 'impala_identity_on{engine="0"} 1.0' in client.get("/metrics")[1]
        yield Survivor(client, sorted(itertools.chain(*answered)), [agent.history for agent in agents])
        assert "Traceback" not in server.log.read_text(errors="replace").partition("Application startup complete")[2]


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 1200)
def test_a_server_stays_well_under_traffic_that_does_not(model: str, tmp_path: Path) -> None:
    with survived(model, tmp_path, Load(num_agents=12, max_history=1800), ""):
        pass


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 1200)
def test_with_kv_for_three_of_sixty_agents_nobody_waits_beyond_the_bound(model: str, tmp_path: Path) -> None:
    load = Load(num_agents=60, max_history=900, max_tokens=64, max_gap_s=3.0)
    flags = ("--impala-mode", "enforce", "--num-gpu-blocks-override", "90")
    with survived(model, tmp_path, load, f"rank:\n  hold_s: {HOLD_S}\n", *flags) as survivor:
        client, answered_s = survivor.client, survivor.answered_s
        until(lambda: client.json("/impala/health")["status"] == "idle")
        assert client.metric("impala_policy_on{") == 1
        assert client.metric("impala_held_turns{") == 0
        assert client.metric("impala_kv_blocks_evicted_total{") > 0, "the pool was never short"
        # A turn past the bound is behind older ones only, at most one an agent: the longest time that many took.
        times = zip(answered_s, answered_s[load.num_agents :], strict=False)
        service_s = max((end_s - begin_s for begin_s, end_s in times), default=SECONDS)
        longest_s = client.metric("impala_longest_wait_seconds{")
        print(f"longest wait {longest_s:.1f} s, {len(answered_s)} answers, allowed {HOLD_S} + {service_s:.1f} s")
        assert 0 < longest_s <= HOLD_S + service_s


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 1200)
def test_tiers_smaller_than_the_traffic_stay_whole(model: str, tmp_path: Path) -> None:
    load = Load(num_agents=30, max_history=900, max_tokens=64, max_gap_s=3.0)
    chunk_gib = 32 * 1024 / (1 << 30)
    tiers = ("--impala-host-gib", str(90 * chunk_gib), "--impala-nvme-path", str(tmp_path / "nvme"))
    flags = ("--num-gpu-blocks-override", "90", *tiers, "--impala-nvme-gib", str(400 * chunk_gib))
    slow = "tiers:\n  host_bytes_per_s: 50.0e6\n  nvme_read_bytes_per_s: 10.0e6\n  nvme_write_bytes_per_s: 10.0e6\n"
    slow += "rank:\n  hold_s: 60\n"  # the client gives up after 120 s
    with survived(model, tmp_path, load, slow, *flags) as survivor:
        client = survivor.client
        until(lambda: client.json("/impala/health")["status"] == "idle")
        assert client.metric("impala_policy_on{") == 1
        for name in ("host_load", "host_evicted", "nvme_read", "nvme_write"):
            assert client.metric(f"impala_kv_{name}_bytes_total{{") > 0, f"{name}: the tiers were never used"
        assert client.metric("impala_kv_nvme_failed_bytes_total{") == 0
        assert client.metric("impala_kv_nvme_usable{") == 1
        # Now from whatever tier has it, then with a salt, under which nothing is found: both must say the same.
        plain = [client.complete(history, max_tokens=8) for history in survivor.histories]
        for history, answer in zip(survivor.histories, plain, strict=True):
            salted = client.complete(history, max_tokens=8, cache_salt=uuid.uuid4().hex)
            assert answer["choices"][0]["token_ids"] == salted["choices"][0]["token_ids"]

"""A server in observe under ten minutes of traffic that behaves badly: `make soak`.

SOAK_S sets another length. Clients stream, cancel, hang up, retry, fork, roll back and send nonsense; at the
end the server must be well, its table bounded, and every request that was not broken off answered.
"""

import concurrent.futures
import contextlib
import os
import random
import socket
import time
import urllib.error
from pathlib import Path

import pytest

from impala_vllm.replay.server import Server
from tests.e2e.client import Client
from tests.e2e.conftest import ENVIRONMENT, MAX_TRACES, READY_S, command

SECONDS = float(os.environ.get("SOAK_S", "600"))
NUM_CLIENTS = 12


class Agent:
    """One badly behaved client with its own random state."""

    def __init__(self, client: Client, seed: int) -> None:
        self._client = client
        self._rng = random.Random(seed)
        self._history = self._fresh()
        self.num_answered = 0

    def live(self, until: float) -> int:
        """Take turns until the time is over; how many were answered."""
        while time.monotonic() < until:
            self._rng.choice([self._turn] * 6 + [self._hang_up, self._roll_back, self._nonsense, self._start_over])()
        return self.num_answered

    def _fresh(self) -> list[int]:
        return [7] * 64 + [self._rng.randrange(20, 900) for _ in range(self._rng.randrange(40, 400))]

    def _turn(self) -> None:
        answer = self._client.complete(self._history, max_tokens=8)
        self._history += answer["choices"][0]["token_ids"] + [self._rng.randrange(20, 900) for _ in range(24)]
        self.num_answered += 1
        if len(self._history) > 1800:
            self._start_over()

    def _hang_up(self) -> None:
        body = {"model": "tiny", "prompt": self._history, "max_tokens": 200, "ignore_eos": True}
        with contextlib.suppress(OSError, socket.timeout):
            for _ in zip(range(self._rng.randrange(3)), self._client.events("/v1/completions", body), strict=False):
                pass

    def _roll_back(self) -> None:
        self._history = self._history[: max(64, len(self._history) * 2 // 3)]

    def _nonsense(self) -> None:
        with pytest.raises(urllib.error.HTTPError) as error:
            self._client.complete(self._history, max_tokens=-self._rng.randrange(1, 9))
        assert error.value.code == 400

    def _start_over(self) -> None:
        self._history = self._fresh()


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 1200)
def test_a_server_stays_well_under_traffic_that_does_not(model: str, tmp_path: Path) -> None:
    config = tmp_path / "impala.yaml"
    config.write_text(f"identity:\n  max_traces: {MAX_TRACES}\n")
    serve = command(model, "--scheduler", "impala", "--impala-config", str(config))
    with Server("soak", serve, tmp_path / "soak.log", ENVIRONMENT) as server:
        server.wait_ready(READY_S)
        client = Client(server.url)
        until = time.monotonic() + SECONDS
        with concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS) as pool:
            agents = [Agent(client, seed) for seed in range(NUM_CLIENTS)]
            answered = list(pool.map(lambda agent: agent.live(until), agents))
        assert all(answered), "a client never got an answer"
        health = client.json("/impala/health")
        assert health["status"] in ("ok", "idle"), health
        assert 0 < len(client.rows("traces")) <= MAX_TRACES
        assert "impala_identity_on" in client.get("/metrics")[1]
        assert "Traceback" not in server.log.read_text(errors="replace").partition("Application startup complete")[2]

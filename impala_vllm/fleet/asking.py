"""Questions to one server, and how long its answers may take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from impala_vllm.fleet.events.snapshot import SnapshotError
from impala_vllm.fleet.places import ServerId

BLOCKS_A_PAGE = 10_000
"""Of a snapshot: half a millisecond of the engine loop, 160 KB."""


@dataclass(frozen=True, slots=True)
class AskingConfig:
    """How servers are asked."""

    every_s: float = 2.0
    """Between two looks at /health."""
    details_every_s: float = 15.0
    """Between two handshakes; a restarted engine is found by it at the latest."""
    within_s: float = 5.0
    down_every_s: float = 0.5
    """Between two looks at one that is down. With `reach_s` well under 2 s: so soon after the network is back all that
    it holds is to be known again."""
    down_apart_s: float = 0.005
    """Between two looks at any of those that are down, in the mean: where hundreds are, each has to wait."""
    reach_s: float = 0.75
    """For a connection to one that is down. A connection asked for just before the network was back stands later."""
    patient_every: int = 4
    """Looks at one that is down and speaks TLS, of which one waits for its handshake as long as for any answer."""
    failures: int = 3
    """Looks in vain, in a row, after which a server is down."""
    silence_s: float = 20.0
    """Without a word to any look, after which requests that are under way are given up. Longer than a network is away
    that their connections outlive."""


class Asking:
    """One server's."""

    def __init__(
        self, server_id: ServerId, session: aiohttp.ClientSession, headers: Mapping[str, str], config: AskingConfig
    ) -> None:
        self.hurries = False
        """It is down: no connection is waited for for long."""
        self._id = server_id
        self._session = session
        self._headers = headers
        self._config = config

    def look(self, is_down: bool, num_failures: int) -> None:
        """Before each look, after so many in vain."""
        is_patient = self._id.startswith("https:") and (num_failures + 1) % self._config.patient_every == 0
        self.hurries = is_down and not is_patient

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body. Raises aiohttp.ClientError, TimeoutError or OSError where there is no answer."""
        reach_s = self._config.reach_s if self.hurries else None
        timeout = aiohttp.ClientTimeout(total=self._config.within_s, sock_connect=reach_s)
        async with self._session.get(self._id + path, headers=self._headers, timeout=timeout) as response:
            return response.status, await response.read()

    async def models(self) -> list[dict[str, Any]] | None:
        """What it serves; None where it does not say."""
        try:
            status, body = await self.get("/v1/models")
            return msgspec.json.decode(body, type=_Models).data if status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError):
            return None

    async def blocks(self, dp_rank: int, after: str | None) -> bytes:
        """A page of a snapshot. Raises SnapshotError."""
        more = f"&after={after}" if after is not None else ""
        try:
            status, body = await self.get(f"/impala/blocks?rank={dp_rank}&limit={BLOCKS_A_PAGE}{more}")
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise SnapshotError(type(e).__name__) from e
        if status != 200:
            raise SnapshotError(f"status {status}")
        return body


class _Models(msgspec.Struct):
    data: list[dict[str, Any]]

"""How Redis is reached, and how often."""

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from impala_vllm.fleet.registry.layout import Client

_SCHEMES = ("redis", "rediss", "unix")


class RegistryError(ValueError):
    """Not a registry; one line."""


@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """Periods of the exchange."""

    every_s: float = 0.1
    """Between two looks at changes, and two words on how busy servers are."""
    claim_s: float = 1.0
    """Between two looks at who tells of which replica."""
    lease_s: float = 5.0
    """A router that is silent for so long no longer tells."""
    within_s: float = 1.25
    """For Redis to answer. With `again_s` the longest that routers go on alone after the network is back: under 2 s."""
    believed_s: float = 10.0
    """What others told, after they or Redis fell silent."""
    again_s: float = 0.25
    """Between two attempts to reach Redis."""


def said(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def connect(url: str, config: RegistryConfig) -> Client:
    """Raises RegistryError. Nothing is sent yet."""
    if urlsplit(url).scheme not in _SCHEMES:
        raise RegistryError(f"{url}: unknown registry; write memory, or redis://HOST:PORT/DB")
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as e:
        raise RegistryError("a shared registry needs redis; `pip install 'impala-vllm[redis]'`") from e
    library: Any = Redis
    try:
        return library.from_url(
            url,
            protocol=2,
            socket_timeout=config.within_s,
            socket_connect_timeout=config.within_s,
            retry=Retry(NoBackoff(), 0),  # a failure is acted upon, not hidden
        )
    except ValueError as e:
        raise RegistryError(f"{url.partition('@')[2] or url}: {e}") from e

"""Where servers are, as people write it: on a command line, in a file, in a request."""

from typing import NamedTuple

from impala_vllm.fleet.events import Endpoints
from impala_vllm.fleet.events.feed import EndpointError
from impala_vllm.fleet.places import ServerId


class AddressError(ValueError):
    """Not a server's address; one line."""


class Address(NamedTuple):
    """Where a server is."""

    url: ServerId
    events: Endpoints | None = None
    """Where it publishes; None: as its handshake says."""


def parse_address(text: str) -> Address:
    """`URL`, or `URL=EVENTS[,REPLAY]`. Raises AddressError."""
    url, _, events = text.strip().partition("=")
    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")) or not url.partition("//")[2]:
        raise AddressError(f"{text.strip()}: not a server; write http://HOST:PORT")
    if not events:
        return Address(ServerId(url))
    at, _, replay = events.partition(",")
    try:
        return Address(ServerId(url), Endpoints(at, replay or None))
    except EndpointError as e:
        raise AddressError(str(e)) from e


def parse_file(text: str, where: str) -> list[Address]:
    """Addresses, one a line; blank lines and those that begin with # are left out. Raises AddressError.

    A server that is listed again publishes where it did before.
    """
    addresses: dict[ServerId, Address] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                address = parse_address(line)
            except AddressError as e:
                raise AddressError(f"{where}:{number}: {e}") from e
            if addresses.setdefault(address.url, address) != address:
                raise AddressError(f"{where}:{number}: {address.url} is listed before, with other events")
    return list(addresses.values())

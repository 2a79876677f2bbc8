"""Which headers go on, and how: what belongs to one connection does not, values stay as they are byte for byte."""

from collections.abc import Iterable

Raw = Iterable[tuple[bytes, bytes]]

_RANK = "X-data-parallel-rank"
_OF_A_CONNECTION = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade".split()
)
_MADE_ANEW = frozenset(b"host content-length expect".split())
_OWN = frozenset((b"date", b"server"))
"""Of an answer: the router's own server writes them."""


def for_server(headers: Raw) -> list[tuple[str, str]] | None:
    """A client's headers, its key included; None where a value cannot be sent on as it is.

    The client library writes UTF-8, so what is that keeps its bytes; nothing else is sent in practice.
    """
    kept = [(name.lower(), value) for name, value in headers]
    dropped = _OF_A_CONNECTION | _MADE_ANEW | _named(kept)
    try:
        return [(name.decode("ascii"), value.decode()) for name, value in kept if name not in dropped]
    except UnicodeDecodeError:
        return None


def with_rank(headers: list[tuple[str, str]], dp_rank: int) -> list[tuple[str, str]]:
    """vLLM sends a request to the rank that a header names; a client's own word for it goes."""
    return [*(one for one in headers if one[0] != _RANK.lower()), (_RANK, str(dp_rank))]


def for_client(headers: Raw) -> list[tuple[bytes, bytes]]:
    """A server's headers."""
    kept = [(name.lower(), value) for name, value in headers]
    dropped = _OF_A_CONNECTION | _OWN | _named(kept)
    return [(name, value) for name, value in kept if name not in dropped]


def _named(headers: Raw) -> frozenset[bytes]:
    """Further headers that belong to the connection, as it says."""
    said = [value for name, value in headers if name == b"connection"]
    return frozenset(name.strip().lower() for value in said for name in value.split(b","))

"""Which headers go on, and how: what belongs to one connection does not, values stay as they are."""

from collections.abc import Iterable

Raw = Iterable[tuple[bytes, bytes]]

_RANK = "X-data-parallel-rank"
_OF_A_CONNECTION = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade".split()
)
_MADE_ANEW = frozenset(b"host content-length expect".split())
_OWN = frozenset((b"date", b"server"))
"""Of an answer: the router's own server writes them."""


def for_server(headers: Raw) -> list[tuple[str, str]]:
    """A client's headers, its key included.

    The client library writes UTF-8 and nothing else: values in that, and so in ASCII, keep their bytes; others, which
    are latin-1 by HTTP's old rule, keep their characters.
    """
    kept = [(name.lower(), value) for name, value in headers]
    dropped = _OF_A_CONNECTION | _MADE_ANEW | _named(kept)
    return [(name.decode("latin-1"), _text(value)) for name, value in kept if name not in dropped]


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


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")

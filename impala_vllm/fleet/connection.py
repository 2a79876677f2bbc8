"""A connection to a server: one whose other end may vanish without a word."""

import socket
from typing import Any

_TCP_OPTIONS = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}
"""Seconds, and milliseconds for what was sent and is not acknowledged."""


def open_socket(address: tuple[Any, ...]) -> socket.socket:
    """A connection to a server notices within half a minute that nobody is there, where the platform can."""
    family, kind, protocol = address[:3]
    made = socket.socket(family, kind, protocol or socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _TCP_OPTIONS.items():
        option = getattr(socket, name, None)
        if option is not None:
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made

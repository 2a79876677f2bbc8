"""What an error of a connection to a server says: the server is gone or silent, or it is this router that is short."""

import errno

_SHORT = frozenset({errno.EMFILE, errno.ENFILE})
_SILENT = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ETIMEDOUT})
_GONE = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN})


def is_own(error: Exception) -> bool:
    """Out of file descriptors: it says nothing about the server."""
    return isinstance(error, OSError) and error.errno in _SHORT


def is_silence(error: Exception) -> bool:
    """Nothing came back, not even a refusal: open connections may be as dead, and nobody will say so."""
    return isinstance(error, TimeoutError) or (isinstance(error, OSError) and error.errno in _SILENT)


def is_gone(error: Exception) -> bool:
    """Nobody listens there, or no way leads there."""
    return isinstance(error, OSError) and error.errno in _GONE

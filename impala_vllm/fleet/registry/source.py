"""What the fleet knows of a replica whose hashes are believed."""

from typing import NamedTuple


class Source(NamedTuple):
    """Of one replica."""

    namespace: str
    epoch: str
    is_heard: bool
    """What its own events told this router is believed."""


NOWHERE = Source("", "", False)

"""Whether what servers publish are the blocks that were computed here for the prompts they were sent.

A handshake proves the hashes of tokens, not the tokens: an engine that renders chats otherwise publishes keys that no
prompt of the router's ever has, and every lookup is a miss. That is said once a server.
"""

import logging
from collections import deque
from collections.abc import Callable

from impala_vllm.fleet.places import BlockKey, Replica

logger = logging.getLogger("impala.fleet")

AFTER_S = 5.0
"""From a turn's end until its first block must have been published."""
MAX_WAITING = 256
"""Turns that are looked after at once; further ones are not."""
NUM_SILENT = 32
"""Turns without an echo after which it is said, where three in four had none."""


class Echo:
    """Used on one thread."""

    def __init__(self, is_known: Callable[[Replica, BlockKey], bool]) -> None:
        self._is_known = is_known
        self._waiting: deque[tuple[float, Replica, BlockKey]] = deque()
        self._heard: dict[Replica, int] = {}
        self._missed: dict[Replica, int] = {}
        self.silent: set[Replica] = set()
        """Those of which it was said."""

    def expect(self, replica: Replica, first: BlockKey, now: float) -> None:
        """The replica, whose events are followed, has served a prompt that begins with this block."""
        if len(self._waiting) < MAX_WAITING and replica not in self.silent:
            self._waiting.append((now, replica, first))

    def forget(self, replica: Replica) -> None:
        """It is gone, or has lost its KV."""
        self._waiting = deque(one for one in self._waiting if one[1] != replica)
        self._heard.pop(replica, None)
        self._missed.pop(replica, None)
        self.silent.discard(replica)

    def look(self, now: float) -> None:
        """Call now and then."""
        while self._waiting and now - self._waiting[0][0] >= AFTER_S:
            _, replica, first = self._waiting.popleft()
            counts = self._heard if self._is_known(replica, first) else self._missed
            counts[replica] = counts.get(replica, 0) + 1
            missed, heard = self._missed.get(replica, 0), self._heard.get(replica, 0)
            if missed >= NUM_SILENT and missed >= 3 * heard and replica not in self.silent:
                self.silent.add(replica)
                logger.warning(
                    "%s: the first blocks of %d in %d prompts never appeared in its events: what it computes hashes "
                    "otherwise than what is computed here; is its chat template another one?",
                    replica.server,
                    missed,
                    missed + heard,
                )

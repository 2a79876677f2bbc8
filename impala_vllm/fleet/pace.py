"""How often servers are looked at, when what failed is tried again; says that the router lacks what looking takes."""

import logging
import math
from random import Random

from impala_vllm.fleet.asking import AskingConfig

logger = logging.getLogger("impala.fleet")

AGAIN_S = 60.0
"""A shortage of which nothing was heard for so long is over; the next one is told."""
MAX_AGAIN_S = 60.0


class Pace:
    """All servers of a fleet share it."""

    def __init__(self, config: AskingConfig, lot: Random) -> None:
        self.num_down = 0
        """Servers, as they say of themselves."""
        self._config = config
        self._lot = lot
        self._short_at_s = -math.inf

    def pause_s(self, is_down: bool) -> float:
        """Until the next look. Never the same twice, so that servers that were lost together are not asked together."""
        config = self._config
        mean_s = config.every_s
        if is_down:
            mean_s = max(min(mean_s, config.down_every_s), self.num_down * config.down_apart_s)
        return mean_s * self._lot.uniform(0.75, 1.25)

    def again_s(self, num_failures: int) -> float:
        """Until what has failed so often in a row is tried again: each time twice as long, a minute at most."""
        mean_s = min(MAX_AGAIN_S, self._config.every_s * 2.0 ** min(num_failures - 1, 16))
        return mean_s * self._lot.uniform(0.75, 1.25)

    def is_short(self, error: Exception, now_s: float) -> None:
        """This router could not look at a server."""
        if now_s - self._short_at_s > AGAIN_S:
            logger.error("servers cannot be asked: %s", error)
        self._short_at_s = now_s

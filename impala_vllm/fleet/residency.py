"""What is believed to lie where: what servers said, and what was just sent and must soon be there.

Twenty agents that start at once share a stem nobody has computed yet: without the second half each would go elsewhere.
Of a server that publishes no events, what was sent there is all that is known, and is believed for a while.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from impala_vllm.fleet.index import Depths, Index, IndexConfig, MaskIndex
from impala_vllm.fleet.places import BlockKey, Replica, Tier

BELIEVED_S = 600.0
"""Of a server without events: about as long as KV lasts on a busy one."""
_NOTHING = Depths(0, 0, 0, 0)
MAX_EXPECTED = 4096
"""Blocks of one prompt that are noted as expected: noting them costs a microsecond each."""


class Expectation(NamedTuple):
    """Blocks that a replica is about to compute."""

    replica: Replica
    keys: Sequence[BlockKey]


class Residency:
    """Both halves behind one question. Used on one thread."""

    def __init__(self, known: Index, config: IndexConfig) -> None:
        self.known = known
        self._guessed = MaskIndex(IndexConfig(ttl_s=BELIEVED_S, max_bytes=config.max_bytes // 4))

    def depths(self, keys: Sequence[BlockKey]) -> Mapping[Replica, Depths]:
        """See `Index.prefixes`; what is expected counts as if it lay in HBM, behind what is known."""
        known = self.known.prefixes(keys)
        if not self._guessed.stats().num_blocks or not keys:
            return known
        merged = dict(known)
        starts = {depths.remote for depths in known.values()} | {0}
        for start in starts:
            if start == len(keys) or not self._guessed.num_replicas(keys[start]):
                continue
            for replica, further in self._guessed.prefixes(keys[start:]).items():
                before = known.get(replica)
                if (before.remote if before is not None else 0) == start:
                    end = start + further.hbm
                    merged[replica] = Depths(*(end if depth == start else depth for depth in before or _NOTHING))
        return merged

    def expect(self, replica: Replica, keys: Sequence[BlockKey], num_there: int, now: float) -> Expectation:
        """The replica is sent a prompt of which it has, or is about to have, `num_there` blocks."""
        new = Expectation(replica, keys[num_there : num_there + MAX_EXPECTED])
        self._guessed.store(replica, Tier.HBM, new.keys, now)
        return new

    def settle(self, expected: Expectation, has_events: bool) -> None:
        """It has answered, or failed: from now on its events tell. Without events the guess stays."""
        if has_events:
            self._guessed.remove(expected.replica, Tier.HBM, expected.keys)

    def forget(self, replica: Replica) -> None:
        """The replica is gone, or has begun anew."""
        self.known.clear(replica)
        self._guessed.clear(replica)

    def expire(self, now: float) -> None:
        """Call now and then."""
        self.known.expire(now)
        self._guessed.expire(now)

"""What brings a silent program's KV back once HBM has lost it: computing it, or loading what lies below HBM of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica


class Reload(NamedTuple):
    """One way."""

    load_s: float
    """The engine serves others meanwhile."""
    compute_s: float
    """It does not."""

    @property
    def total_s(self) -> float:
        return self.load_s + self.compute_s


def computed(replica: "Replica", num_tokens: int) -> Reload:
    """All of a context computed again."""
    return Reload(0.0, replica.timing.prefill_s(num_tokens, 0))


def loaded(replica: "Replica", keys: Sequence[int], num_tokens: int) -> Reload:
    """What host and NVMe have, or are being sent, of a context's beginning is loaded, the rest computed. O(blocks)."""
    tiers = replica.tiers
    if tiers is None:
        return computed(replica, num_tokens)
    num_below = num_read = 0
    for key in keys:
        if key not in tiers.host:
            if key not in tiers.nvme:
                break
            num_read += 1
        num_below += 1
    load_s = tiers.loads.due_s(num_below * tiers.room.block_bytes) if num_below else 0.0
    if num_read:
        load_s += tiers.reads.due_s(num_read * tiers.room.block_bytes)
    before = num_below * replica.shape.block_size
    return Reload(load_s, replica.timing.prefill_s(num_tokens - before, before))

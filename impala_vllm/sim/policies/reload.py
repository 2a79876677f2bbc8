"""What brings a silent program's KV back once HBM has lost it: computing it, or loading what host has of it."""

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
    """What host has, or is being sent, of a context's beginning is loaded, the rest computed. O(blocks).

    What NVMe alone has counts as lost: it is read into host in the place of what others will want, so that what is
    there now says little about a later turn (counted, both that ask here had tasks wait longer; DECISIONS 66).
    """
    tiers = replica.tiers
    if tiers is None:
        return computed(replica, num_tokens)
    num_blocks = next((i for i, key in enumerate(keys) if key not in tiers.host), len(keys))
    load_s = tiers.loads.due_s(num_blocks * tiers.room.block_bytes) if num_blocks else 0.0
    before = num_blocks * replica.shape.block_size
    return Reload(load_s, replica.timing.prefill_s(num_tokens - before, before))

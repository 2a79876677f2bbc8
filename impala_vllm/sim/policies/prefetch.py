"""KV of silent programs brought from host into HBM ahead of their next turn: what policies that upload early do."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica


class Prefetch:
    """Takes places in HBM of its own, and leaves them behind as idle cached blocks."""

    def __init__(self, replica: "Replica") -> None:
        self._replica = replica
        self.num_blocks = 0
        """Brought so far."""

    def missing(self, keys: Sequence[int]) -> tuple[int, int]:
        """Where a chain's blocks in HBM end, and where those end that host has behind them."""
        replica = self._replica
        if replica.tiers is None:
            return 0, 0
        start = len(replica.pool.find(keys, len(keys)))
        return start, start + replica.tiers.num_ready(keys[start:])

    def load_s(self, num_blocks: int) -> float:
        """How long they take at the link's rate, what is queued before them included."""
        tiers = self._replica.tiers
        return 0.0 if tiers is None else tiers.loads.due_s(num_blocks * tiers.room.block_bytes)

    def bring(self, keys: Sequence[int], owner: str | None, room: Callable[[], int] | None = None) -> None:
        """Load what host has behind the blocks in HBM; as many as nobody who runs or loads will need.

        `room`: blocks that may be lost for it, blank ones apart; None: all that are idle.
        """
        if self._replica.tiers is not None:
            self._replica.tiers.between_steps(partial(self._bring, keys, owner, room))

    def _bring(self, keys: Sequence[int], owner: str | None, room: Callable[[], int] | None) -> None:
        replica = self._replica
        start, end = self.missing(keys)
        count = min(end - start, replica.pool.num_free - replica.promised_blocks())
        if room is not None:
            count = min(count, replica.pool.num_blank + room())
        if replica.tiers is None or count <= 0:
            return
        head = replica.pool.find(keys, start)
        replica.pool.touch(head)  # they would else be the first to go for what comes behind them
        count = min(count, replica.pool.num_free)
        if not count:
            replica.pool.release(head, owner)
            return
        blocks = replica.pool.take(count)
        self.num_blocks += count
        wanted = keys[start : start + count]
        replica.tiers.bring(wanted, partial(self._came, head, blocks, wanted, owner))

    def _came(self, head: Sequence[int], blocks: Sequence[int], keys: Sequence[int], owner: str | None) -> None:
        pool = self._replica.pool
        pool.cache(blocks, keys)
        pool.release([*head, *blocks], owner)

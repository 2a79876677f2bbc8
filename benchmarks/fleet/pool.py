"""KV of an emulated server: blocks by key, and which of them have to go."""

from collections import OrderedDict
from collections.abc import Sequence

from impala_vllm.fleet.places import BlockKey


class Pool:
    """Blocks by key, least recently used first."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._blocks: OrderedDict[BlockKey, None] = OrderedDict()

    @property
    def usage(self) -> float:
        """Share of it that is taken."""
        return len(self._blocks) / self._num_blocks

    def holds(self, key: BlockKey) -> bool:
        """Whether a block is there."""
        return key in self._blocks

    def num_held(self, keys: Sequence[BlockKey]) -> int:
        """Leading blocks that are there."""
        return next((i for i, key in enumerate(keys) if key not in self._blocks), len(keys))

    def use(self, keys: Sequence[BlockKey]) -> tuple[list[BlockKey], list[BlockKey]]:
        """Hold these from now on; what is new, and what had to go."""
        new = [key for key in keys if key not in self._blocks]
        for key in reversed(keys):  # the tail is evicted before the root
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        gone: list[BlockKey] = []
        while len(self._blocks) > self._num_blocks:
            gone.append(self._blocks.popitem(last=False)[0])
        return new, gone

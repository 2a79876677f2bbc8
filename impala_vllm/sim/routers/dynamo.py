"""The cost of NVIDIA Dynamo's KV router (https://github.com/ai-dynamo/dynamo), re-implemented on exact residency."""

from collections.abc import Sequence

from impala_vllm.sim.routers.informed import Informed
from impala_vllm.sim.routers.peer import Ask, Machines


class DynamoCost(Informed):
    """Blocks to compute, those in the queue among them, and blocks that decode."""

    def __init__(self, machines: Machines) -> None:
        super().__init__(machines)
        self._prefill_blocks = [0] * len(machines.places)
        self._active_blocks = [0] * len(machines.places)

    def pick(self, ask: Ask, running: Sequence[int], now: float) -> int:
        num_blocks, held = len(ask.keys), self.held_blocks(ask.keys)

        def cost(number: int) -> int:
            new = num_blocks - held[number]
            return new + self._prefill_blocks[number] + self._active_blocks[number] + num_blocks

        chosen = min(range(len(running)), key=lambda i: (cost(i), running[i]))
        self._prefill_blocks[chosen] += num_blocks
        self._active_blocks[chosen] += num_blocks
        return chosen

    def answered(self, ask: Ask, number: int, now: float) -> None:
        self._prefill_blocks[number] -= len(ask.keys)

    def ended(self, ask: Ask, number: int, now: float) -> None:
        self._active_blocks[number] -= len(ask.keys)

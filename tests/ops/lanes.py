"""A lane whose work is done when the test says so, as a GPU's is when the GPU gets to it."""

from collections.abc import Callable

import torch

from impala_vllm.ops.lane import End


class ManualLane:
    """Batches wait in it, first in first out."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[[], None], ManualEnd]] = []

    def run(self, launch: Callable[[], None]) -> End:
        end = ManualEnd(self)
        self.waiting.append((launch, end))
        return end

    def advance(self, num_batches: int = 1) -> None:
        """Do the next ones."""
        for _ in range(num_batches):
            launch, end = self.waiting.pop(0)
            launch()
            end.is_over = True


class ManualEnd:
    def __init__(self, lane: ManualLane) -> None:
        self._lane = lane
        self.is_over = False

    def is_done(self) -> bool:
        return self.is_over

    def wait(self) -> None:
        while not self.is_over:
            self._lane.advance()

    def hold_back(self, stream: torch.cuda.Stream) -> None:
        raise AssertionError("there is no stream here")

    def seconds(self) -> float:
        assert self.is_over, "it is not known how long it takes"
        return 0.25

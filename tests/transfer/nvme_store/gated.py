"""A disk that waits until the test lets it go on."""

import threading
from collections.abc import Sequence

from impala_vllm.transfer.block_io import BlockIo, Completion, Op


class GatedIo:
    """An engine whose ops reach the real one when `open_gate` was called; says when it is polled with ops held."""

    def __init__(self, inner: BlockIo) -> None:
        self.alignment_bytes = inner.alignment_bytes
        self.name = inner.name
        self.is_waiting = threading.Event()
        """Set once the coordinator waits for ops that are held."""
        self.fails_with: type[BaseException] | None = None
        self._inner = inner
        self._held: list[Op] = []
        self._is_open = False

    @property
    def num_in_flight(self) -> int:
        return len(self._held) + self._inner.num_in_flight

    def submit(self, ops: Sequence[Op]) -> None:
        self._held += ops

    def poll(self, timeout_s: float = 0.0) -> list[Completion]:
        if self.fails_with is not None:
            raise self.fails_with("the engine is broken")
        if self._is_open:
            held, self._held = self._held, []
            self._inner.submit(held)
        if self._held:
            self.is_waiting.set()
        return self._inner.poll(timeout_s)

    def open_gate(self) -> None:
        self._is_open = True
        self.wake()

    def wake(self) -> None:
        self._inner.wake()

    def close(self) -> None:
        self._inner.close()

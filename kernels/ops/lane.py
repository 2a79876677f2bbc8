"""Where batches of copies run beside a model, in the order in which they were given: a stream on a GPU.

Memory of the host knows no streams: there a batch is done at once.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


class End(Protocol):
    """The end of a batch. Nobody waits for it but who asks to."""

    def is_done(self) -> bool:
        """Whether every byte is there. O(1), asks the driver."""
        ...

    def wait(self) -> None:
        """Make the host wait for it."""
        ...

    def hold_back(self, stream: torch.cuda.Stream) -> None:
        """Work launched on `stream` from here on begins after it; the host does not wait."""
        ...

    def seconds(self) -> float:
        """How long the batch took, the wait before it not counted. It is done."""
        ...


class Lane(Protocol):
    """One direction. One thread's."""

    def run(self, launch: Callable[[], None]) -> End:
        """Call `launch`: what it launches begins after all that was launched on the current stream up to now, and
        after the batches before it in this lane. Waits for nothing."""
        ...


def of(device: torch.device) -> Lane:
    """A lane of its own for copies on `device`."""
    return SideStream(device) if device.type == "cuda" else AtOnce()


class SideStream:
    """A stream beside the current one."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def run(self, launch: Callable[[], None]) -> End:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            begin.record(self._stream)
            launch()
            end.record(self._stream)
        return _StreamEnd(begin, end)


@dataclass(frozen=True, slots=True)
class _StreamEnd:
    begin: torch.cuda.Event
    end: torch.cuda.Event

    def is_done(self) -> bool:
        return self.end.query()

    def wait(self) -> None:
        self.end.synchronize()

    def hold_back(self, stream: torch.cuda.Stream) -> None:
        stream.wait_event(self.end)

    def seconds(self) -> float:
        return self.begin.elapsed_time(self.end) / 1e3


class AtOnce:
    """Done when `run` returns."""

    def run(self, launch: Callable[[], None]) -> End:
        began_s = time.perf_counter()
        launch()
        return _Past(time.perf_counter() - began_s)


@dataclass(frozen=True, slots=True)
class _Past:
    took_s: float

    def is_done(self) -> bool:
        return True

    def wait(self) -> None: ...

    def hold_back(self, stream: torch.cuda.Stream) -> None: ...

    def seconds(self) -> float:
        return self.took_s

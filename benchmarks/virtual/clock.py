"""An event loop whose clock jumps to the next timer instead of waiting for it.

What runs on it must not wait for anything but timers and other tasks of the loop.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in virtual time, which starts at 0."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(main)


class _Selector(selectors.SelectSelector):
    """Nothing ever becomes ready but by time."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("every task waits for something that no timer brings")
        self.now_s += timeout
        return []


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        # Timers due within the resolution run together; asyncio would else ask for waits of nothing.
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._virtual.now_s

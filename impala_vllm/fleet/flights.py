"""Requests under way to one server, and how they end where it says nothing more."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator


class Flights:
    """One server's."""

    def __init__(self, patience_s: float) -> None:
        self._flights: set[asyncio.Timeout] = set()
        self._patience_s = patience_s
        self._silent_since_s: float | None = None

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncGenerator[None, None]:
        """Around a request. Raises TimeoutError inside once it is given up."""
        async with asyncio.timeout(None) as flight:
            self._flights.add(flight)
            try:
                yield
            finally:
                self._flights.discard(flight)

    def heard(self) -> None:
        """It answered a look, or refused: when a process ends, its connections do too."""
        self._silent_since_s = None

    def silent(self, began_s: float, now_s: float) -> bool:
        """Nothing came back to a look. Answers whether that has been so for longer than is waited for."""
        if self._silent_since_s is None:
            self._silent_since_s = began_s
        return now_s - self._silent_since_s >= self._patience_s

    def give_up(self) -> None:
        """All that are under way now."""
        now_s = asyncio.get_running_loop().time()
        for flight in self._flights:
            flight.reschedule(now_s)
        self._flights.clear()

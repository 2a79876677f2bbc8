"""Requests under way to one server, and how they end where it says nothing more."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator


class Flights:
    """One server's."""

    def __init__(self) -> None:
        self._flights: set[asyncio.Timeout] = set()

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncGenerator[None, None]:
        """Around a request. Raises TimeoutError inside once it is given up."""
        async with asyncio.timeout(None) as flight:
            self._flights.add(flight)
            try:
                yield
            finally:
                self._flights.discard(flight)

    def give_up(self) -> None:
        """All that are under way now."""
        now_s = asyncio.get_running_loop().time()
        for flight in self._flights:
            flight.reschedule(now_s)
        self._flights.clear()

"""A network between two parties that can be cut and mended: bytes wait, as they do between hosts that are parted."""

import asyncio
import contextlib
from pathlib import Path


class Cable:
    """Listens on a free port of this machine and leads to `to`. Use as an async context manager."""

    def __init__(self, to: tuple[str, int] | Path) -> None:
        self._to = to
        self._whole = asyncio.Event()
        self._whole.set()
        self._ends: set[asyncio.Task[None]] = set()
        self._is_forgotten = asyncio.Event()
        self.port = 0

    async def __aenter__(self) -> "Cable":
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._ends):
            task.cancel()
        await asyncio.gather(*self._ends, return_exceptions=True)

    def cut(self) -> None:
        """Nothing comes through, and nobody is told."""
        self._whole.clear()

    def mend(self, *, forgets: bool = False) -> None:
        """Bytes go on. `forgets`: the far end has given up what was open before, and the near end was never told."""
        if forgets:
            self._is_forgotten.set()
            self._is_forgotten = asyncio.Event()
        self._whole.set()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._ends.add(task)
        forgotten = self._is_forgotten
        try:
            await self._whole.wait()
            if forgotten.is_set():
                await self._swallow(reader)
                return
            there = (
                await asyncio.open_unix_connection(self._to)
                if isinstance(self._to, Path)
                else await asyncio.open_connection(*self._to)
            )
            pumps = [
                asyncio.create_task(self._pump(reader, there[1])),
                asyncio.create_task(self._pump(there[0], writer)),
            ]
            dying = asyncio.create_task(forgotten.wait())
            try:
                await asyncio.wait([*pumps, dying], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in (*pumps, dying):
                    pump.cancel()
                await asyncio.gather(*pumps, dying, return_exceptions=True)
                there[1].close()
            if forgotten.is_set():
                await self._swallow(reader)
        except (OSError, asyncio.CancelledError):  # streams call it an error where their callback is cancelled
            pass
        finally:
            self._ends.discard(task)
            writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()

    @staticmethod
    async def _swallow(reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while await reader.read(1 << 16):
                pass

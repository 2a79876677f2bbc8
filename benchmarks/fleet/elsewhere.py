"""A thread in a network namespace of its own, joined to this one by a pair of interfaces whose cable can be pulled.

Linux, as root, with the `ip` command. The namespace and both interfaces go with the thread, whatever ends it. While the
cable is pulled packets vanish: nobody is told, and both ends keep the connections they have.
"""

import asyncio
import contextlib
import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from benchmarks.fleet.emulated import EmulatedServer

CLONE_NEWNET = 0x40000000
T = TypeVar("T")
S = TypeVar("S", bound=EmulatedServer)


class NamespaceError(RuntimeError):
    """No namespace is to be had here; one line."""


class Elsewhere:
    """An event loop in the other namespace. Use as an async context manager; `host` is its address."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._begun = threading.Event()
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._live, name="elsewhere", daemon=True)
        number = os.getpid() * 4 % 65536
        network = f"198.18.{number >> 8}."  # kept free for benchmarks (RFC 2544)
        self.here, self.host = f"{network}{(number & 255) + 1}", f"{network}{(number & 255) + 2}"
        self._near, self._far = f"near{os.getpid()}", f"far{os.getpid()}"

    async def __aenter__(self) -> "Elsewhere":
        """Raises NamespaceError."""
        if shutil.which("ip") is None:
            raise NamespaceError("no network namespaces without the command ip")
        self._thread.start()
        await asyncio.to_thread(self._begun.wait)
        if self._failure is not None:
            self._thread.join()
            raise NamespaceError(self._failure)
        try:
            far = ("peer", "name", self._far, "netns", str(self._thread.native_id))
            _ip("link", "add", self._near, "type", "veth", *far)
            _ip("address", "add", f"{self.here}/30", "dev", self._near)
            _ip("link", "set", self._near, "up")
            await self.run(self._settle())
        except NamespaceError:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)
        subprocess.run(["ip", "link", "delete", self._near], check=False, capture_output=True)

    async def run(self, what: Coroutine[Any, Any, T]) -> T:
        """Do it there."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(what, self._loop))

    @contextlib.asynccontextmanager
    async def hosting(self, server: S) -> AsyncIterator[S]:
        """Around a server there."""
        await self.run(server.__aenter__())
        try:
            yield server
        finally:
            await self.run(server.__aexit__(None, None, None))

    async def part(self) -> None:
        """Pull the cable."""
        await self.run(self._set("down"))

    async def heal(self) -> None:
        """Plug it in again."""
        await self.run(self._set("up"))

    def _live(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET):
            self._failure = f"no network namespace of our own ({os.strerror(ctypes.get_errno())}); it takes root"
        self._begun.set()
        if self._failure is None:
            self._loop.run_forever()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    async def _settle(self) -> None:
        _ip("link", "set", "lo", "up")
        _ip("address", "add", f"{self.host}/30", "dev", self._far)
        _ip("link", "set", self._far, "up")

    async def _set(self, state: str) -> None:
        _ip("link", "set", self._far, state)


def _ip(*arguments: str) -> None:
    """In the namespace of the calling thread. Raises NamespaceError."""
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise NamespaceError(f"ip {' '.join(arguments)}: {done.stderr.strip() or 'it failed'}")

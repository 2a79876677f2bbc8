"""Requests' bodies: read whole, since routing reads them, within bounds of size, of time, and of all together."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from impala_vllm.fleet.proxy.watch import Receive

RETRY_AFTER_S = 2


@dataclass(frozen=True, slots=True)
class BodyConfig:
    """What a router takes in."""

    max_bytes: int = 256 << 20
    """Of one."""
    max_held_bytes: int = 2 << 30
    """Of all that are being read, or wait for their answer's first byte: until then another server may be tried."""
    silence_s: float = 60.0
    """Before its first part, and between two."""
    within_s: float = 1800.0
    """From its request's headers to its end: `max_bytes` over a slow line, but no drop a minute for ever."""


class ClientGone(Exception):
    """The client has left."""


class BodyError(Exception):
    """It is refused; the connection cannot be used further."""

    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class Body:
    """Whoever has it releases it, as soon as it is not needed any more."""

    __slots__ = ("_bodies", "data")

    def __init__(self, data: bytes, bodies: "Bodies") -> None:
        self.data = data
        self._bodies = bodies

    def release(self) -> None:
        """Let go of the data. Idempotent."""
        self._bodies.held_bytes -= len(self.data)
        self.data = b""


class Bodies:
    """One router's."""

    def __init__(self, config: BodyConfig) -> None:
        self.config = config
        self.held_bytes = 0
        self.num_refused: Counter[int] = Counter()
        """By status."""

    async def read(self, headers: Iterable[tuple[bytes, bytes]], receive: Receive) -> Body:
        """Raises BodyError and ClientGone; nothing is held then."""
        try:
            return await self._read(headers, receive)
        except BodyError as e:
            self.num_refused[e.status] += 1
            raise

    async def _read(self, headers: Iterable[tuple[bytes, bytes]], receive: Receive) -> Body:
        said = next((value for name, value in headers if name == b"content-length" and value.isdigit()), b"0")
        self._check(int(said), self.held_bytes + int(said))
        size, parts = 0, list[bytes]()
        loop, silence_s = asyncio.get_running_loop(), self.config.silence_s
        until_s = loop.time() + self.config.within_s
        try:
            async with asyncio.timeout(None) as limit:
                while True:
                    limit.reschedule(min(until_s, loop.time() + silence_s))
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part: bytes = message.get("body", b"")
                    parts.append(part)
                    size += len(part)
                    self.held_bytes += len(part)
                    self._check(size, self.held_bytes)
                    if not message.get("more_body", False):
                        return Body(parts[0] if len(parts) == 1 else b"".join(parts), self)
        except TimeoutError as e:
            self.held_bytes -= size
            text = f"nothing of the body came for {silence_s:g} s, or not all of it within {self.config.within_s:g} s"
            raise BodyError(408, text) from e
        except BaseException:
            self.held_bytes -= size
            raise

    def _check(self, num_bytes: int, held_bytes: int) -> None:
        if num_bytes > self.config.max_bytes:
            raise BodyError(413, f"the body is larger than {self.config.max_bytes >> 20} MiB")
        if held_bytes > self.config.max_held_bytes:
            raise BodyError(503, "too many large requests at once; try again", RETRY_AFTER_S)

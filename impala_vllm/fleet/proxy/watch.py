"""Ends the work for a client that leaves, by cancelling the task that does it: one task more a request, not two."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Watch:
    """Cancels what its body does, and nothing after it, once the client leaves; any other cancelling goes on."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.has_left = False
        self._is_over = False

    def __enter__(self) -> "Watch":
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watching = asyncio.create_task(self._watch())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._is_over = True
        self._watching.cancel()
        if not self.has_left:
            return False
        return self._task.uncancel() == 0 and kind is asyncio.CancelledError

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._is_over:
            self.has_left = True
            self._task.cancel()

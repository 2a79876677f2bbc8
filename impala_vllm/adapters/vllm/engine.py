"""The API server's side of the wire to the engine processes: ask for snapshots, mark requests.

One per API server process, on its event loop. A question that is not answered stays open and is
shared by later callers, so a stuck engine collects one message, not one a health check.
"""

import asyncio
import contextvars
import time
from typing import Any

from impala_vllm.adapters.vllm import choice
from impala_vllm.adapters.vllm.facts import CALLER_KEY
from impala_vllm.caller import Caller

current_caller: contextvars.ContextVar[Caller | None] = contextvars.ContextVar("impala_caller", default=None)
"""Who sent the HTTP request that this task serves. Set by the middleware, read when the engine is called."""


class Engine:
    """The engine client of this process, and what is known of its engines."""

    def __init__(self, client: Any, chats: str | None = None) -> None:
        """`chats`: how this process renders them, see `hello.chats`."""
        self.chats = chats
        self.vllm_config = client.vllm_config
        self.settings = choice.of(client.vllm_config)
        self.config = self.settings.config
        self._client = client
        self._health: asyncio.Future[list[dict[str, Any]]] | None = None
        self._asked_s = 0.0
        self._mark_requests(client.engine_core)

    @property
    def is_dead(self) -> bool:
        """vLLM itself has given the engine up."""
        return bool(self._client.errored)

    @property
    def silent_s(self) -> float:
        """For how long the oldest open question has waited; 0 without one."""
        return time.monotonic() - self._asked_s if self._health is not None and not self._health.done() else 0.0

    async def snapshots(self) -> list[dict[str, Any]] | None:
        """One snapshot a rank, or None where the engines do not answer in time."""
        if self._health is None or self._health.done():
            self._asked_s = time.monotonic()
            self._health = asyncio.ensure_future(self._ask(None))
            self._health.add_done_callback(lambda future: future.cancelled() or future.exception())
        return await self._bounded(asyncio.shield(self._health))

    async def page(self, page: dict[str, Any]) -> list[dict[str, Any]] | None:
        """As `snapshots`, with a page of traces or links in each."""
        if self.silent_s > self.config.health.answer_within_s:
            return None  # it does not answer the shorter question either
        return await self._bounded(self._ask(page))

    async def outcome(self, asked: dict[str, Any]) -> list[int | None] | None:
        """Tell every rank how a trace ended: how many traces each knows, None without a ledger. None: no answer."""
        if self.silent_s > self.config.health.answer_within_s:
            return None
        return await self._bounded(self._client.engine_core.call_utility_all_async("impala_outcome", asked))

    async def _ask(self, page: dict[str, Any] | None) -> list[dict[str, Any]]:
        return await self._client.engine_core.call_utility_all_async("impala_snapshot", page)

    async def _bounded(self, answer: Any) -> list[Any] | None:
        try:
            return await asyncio.wait_for(answer, self.config.health.answer_within_s)
        except Exception:  # a time-out, a dying engine, a refusal while shutting down: no answer
            return None

    def _mark_requests(self, core: Any) -> None:
        """Leave the caller on every request on its way to the engine; a client cannot forge it."""
        add_request_async = core.add_request_async

        async def add_marked(request: Any) -> None:
            mark(request, current_caller.get())
            await add_request_async(request)

        core.add_request_async = add_marked


def mark(request: Any, caller: Caller | None) -> None:
    """Put `caller` where the scheduler finds it, in place of anything that lies there."""
    params = request.sampling_params
    if params is None:
        return
    extra = {k: v for k, v in (params.extra_args or {}).items() if k != CALLER_KEY}
    if caller is not None and (envelope := caller.envelope(request.session_id)):
        extra[CALLER_KEY] = envelope
    params.extra_args = extra or None

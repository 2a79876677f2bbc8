"""Watches a scheduler: recognises traces, counts, keeps the heartbeat. Decides nothing.

Lives in the engine process and runs on its loop's thread only. An error inside identity switches
identity off for the life of the process; requests never notice.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING

from impala_vllm.adapters.vllm import facts
from impala_vllm.adapters.vllm.heartbeat import Heartbeat
from impala_vllm.core.identity import Identity
from impala_vllm.core.types import Link, RequestId

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.impala")

MAX_LINKS = 16_384
"""Answers kept for whoever checks them: some 8 MB."""


class Answered:
    """What was said of a request when it arrived, and what it found when it ran."""

    __slots__ = ("_stats", "link", "prompt_tokens", "turn")

    def __init__(self, turn: RequestId, link: Link, request: "Request") -> None:
        self.turn = turn
        self.link = link
        self.prompt_tokens = request.num_prompt_tokens
        self._stats = request.prefill_stats  # the request lets go of it with its first token

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that it need not compute, in HBM or below; None: it has not begun."""
        stats = self._stats
        return stats.num_cached_tokens if stats is not None and stats.num_prompt_tokens else None


class Observer:
    """The scheduler's hooks call it; `snapshot` reads it."""

    def __init__(
        self,
        identity: Identity,
        tool_call_tokens: frozenset[int] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.identity: Identity | None = identity
        self.identity_error: str | None = None
        self.on_switch_off: Callable[[], None] | None = None
        """Called once where identity fails: there are no traces from then on."""
        self.heartbeat = Heartbeat()
        self.num_arrived = 0
        self.num_unfinished = 0
        self.num_pooling = 0
        self.num_unlinked = 0
        """Generation requests with neither hashes nor a session id: prefix caching is off."""
        self.num_siblings = 0
        """Further children of one `n > 1` request: same turn."""
        self.finished: Counter[str] = Counter()
        self.spent_ns = 0
        """Time spent in here and in policy, over all hooks."""
        self.num_links = 0
        self.clock = clock
        self._tool_call_tokens = tool_call_tokens
        self._num_open: dict[RequestId, int] = {}
        self._link_of: dict[RequestId, Link] = {}
        """Of open turns."""
        self._links: deque[Answered] = deque(maxlen=MAX_LINKS)

    def on_arrival(self, request: "Request") -> Link | None:
        """Before the scheduler queues `request`. Whose turn it is; None where nobody can tell, and for further children
        of one `n > 1` request, whose turn is known (`link_of`)."""
        started_ns = time.perf_counter_ns()
        now = self.clock()
        self.num_arrived += 1
        self.num_unfinished += 1
        self.heartbeat.note_work(self.num_unfinished, now)
        link = None
        if self.identity is not None:
            try:
                link = self._arrive(self.identity, request, now)
            except Exception as e:
                self._switch_off(e)
        self.spent_ns += time.perf_counter_ns() - started_ns
        return link

    def on_finish(self, request: "Request") -> None:
        """When `request` has ended, however it did."""
        started_ns = time.perf_counter_ns()
        now = self.clock()
        self.num_unfinished = max(0, self.num_unfinished - 1)
        self.heartbeat.note_work(self.num_unfinished, now)
        self.finished[str(request.get_finished_reason())] += 1
        if self.identity is not None:
            try:
                self._finish(self.identity, request, now)
            except Exception as e:
                self._switch_off(e)
        self.spent_ns += time.perf_counter_ns() - started_ns

    def link_of(self, request: "Request") -> Link | None:
        """Whose turn an open request is, or is a part of."""
        return self._link_of.get(facts.turn_id(request))

    def shared_depth(self, request: "Request") -> int:
        """Leading blocks of an open request that live traces share with it; 0 where nobody can tell."""
        if self.identity is None:
            return 0
        try:
            return self.identity.shared_depth(facts.turn_id(request))
        except Exception as e:
            self._switch_off(e)
            return 0

    def on_step(self, num_tokens: int) -> None:
        """After a step that had scheduled `num_tokens`."""
        started_ns = time.perf_counter_ns()
        now = self.clock()
        self.heartbeat.beat(num_tokens, now)
        if self.identity is not None:
            try:
                self.identity.tick(now)
            except Exception as e:
                self._switch_off(e)
        self.spent_ns += time.perf_counter_ns() - started_ns

    def links(self, after: int, limit: int) -> list[tuple[int, Answered]]:
        """Up to `limit` answers numbered above `after`, oldest first; the oldest of all may be gone."""
        first = self.num_links - len(self._links) + 1
        skipped = max(0, after + 1 - first)
        return list(enumerate(islice(self._links, skipped, skipped + limit), first + skipped))

    def _arrive(self, identity: Identity, request: "Request", now: float) -> Link | None:
        if request.sampling_params is None:
            self.num_pooling += 1
            return None
        if not request.block_hashes and request.num_prompt_tokens > 0 and not self._can_link(request):
            self.num_unlinked += 1
            return None
        turn = facts.turn_id(request)
        self._num_open[turn] = self._num_open.get(turn, 0) + 1
        if self._num_open[turn] > 1:
            self.num_siblings += 1
            return None
        link = identity.arrive(facts.arrival(request), now)
        self.num_links += 1
        self._links.append(Answered(turn, link, request))
        self._link_of[turn] = link
        return link

    def _finish(self, identity: Identity, request: "Request", now: float) -> None:
        turn = facts.turn_id(request)
        left = self._num_open.get(turn, 0) - 1
        if left > 0:  # the last child ends the turn
            self._num_open[turn] = left
        elif left == 0:
            del self._num_open[turn]
            self._link_of.pop(turn, None)
            identity.finish(facts.finish(request, self._tool_call_tokens), now)

    def _can_link(self, request: "Request") -> bool:
        return request._block_hasher is not None or facts.has_session(request)

    def _switch_off(self, error: Exception) -> None:
        self.identity = None
        self.identity_error = type(error).__name__  # its text may name sessions, and /impala/health is open
        self._num_open.clear()
        self._link_of.clear()
        logger.error("impala: identity failed and is switched off, serving continues", exc_info=error)
        if self.on_switch_off is not None:
            self.on_switch_off()

"""What the front-end may ask the engine process: one snapshot of plain data.

Served between two steps on the engine loop's thread, so it is bounded: a page of traces, counters.
Ages instead of times, because clocks differ between processes.
"""

import heapq
from typing import Any

from impala_vllm.adapters.vllm import facts, hello
from impala_vllm.adapters.vllm.blocks import Blocks
from impala_vllm.adapters.vllm.bookkeeper import Bookkeeper
from impala_vllm.adapters.vllm.observer import Observer
from impala_vllm.adapters.vllm.tiers.manager import TierManager
from impala_vllm.core.traces import Trace

MAX_ROWS = 1000
"""Most traces or links in one page: a millisecond of the engine loop."""


def install_snapshot() -> None:
    """Give EngineCore the utility methods `impala_snapshot` and `impala_outcome`. Idempotent."""
    from vllm.v1.engine.core import EngineCore

    cls: Any = EngineCore
    cls.impala_snapshot = _impala_snapshot
    cls.impala_outcome = _impala_outcome


def _impala_snapshot(self: Any, page: dict[str, Any] | None = None) -> dict[str, Any]:
    return take(self.scheduler, self.vllm_config.parallel_config.data_parallel_index, page)


def _impala_outcome(self: Any, asked: dict[str, Any]) -> int | None:
    return note_outcome(self.scheduler, asked)


def note_outcome(scheduler: Any, asked: dict[str, Any]) -> int | None:
    """How many traces of the caller's got the outcome; None where this engine keeps no ledger."""
    keeper, observer = getattr(scheduler, "bookkeeper", None), getattr(scheduler, "observer", None)
    if keeper is None or observer is None or observer.identity is None:
        return None
    return keeper.report(observer.identity.traces, asked)


def take(scheduler: Any, rank: int, page: dict[str, Any] | None = None) -> dict[str, Any]:
    """The state of one engine. `page` asks for rows too: `of` (traces or links), `limit`, `state`, `after`.

    With `of` hello it asks for the handshake instead, with `of` blocks for what rank `rank` holds.
    """
    if page is not None and page.get("of") == "blocks":
        if page["rank"] != rank:
            return {"rank": rank, "blocks": None}
        if not hasattr(scheduler, "impala_blocks"):
            scheduler.impala_blocks = Blocks()
        return {"rank": rank, "blocks": scheduler.impala_blocks.page(scheduler, page["after"], page["limit"])}
    if page is not None and page.get("of") == "hello":
        return {"rank": rank, "hello": hello.rank(scheduler, rank)}
    observer: Observer | None = getattr(scheduler, "observer", None)
    if observer is None:
        return {"rank": rank, "observed": False}
    running, waiting = scheduler.get_request_counts()
    now = observer.clock()
    beat = observer.heartbeat
    return {
        "rank": rank,
        "observed": True,
        "running": running,
        "waiting": waiting,
        "unfinished": scheduler.get_num_unfinished_requests(),
        "paused": scheduler.pause_state != 0,
        "steps": beat.num_steps,
        "last_step_age_s": _age(beat.last_step_s, now),
        "last_progress_age_s": _age(beat.last_progress_s, now),
        "stuck_s": beat.stuck_s(now),
        "observer_s": observer.spent_ns / 1e9,
        "requests": observer.num_arrived,
        "pooling": observer.num_pooling,
        "unlinked": observer.num_unlinked,
        "siblings": observer.num_siblings,
        "finished": dict(observer.finished),
        "identity": _identity(observer),
        "policy": _policy(scheduler),
        "ledger": _ledger(scheduler),
        "page": _page(observer, page, now, scheduler.hash_block_size) if page is not None else None,
    }


def _identity(observer: Observer) -> dict[str, Any]:
    identity = observer.identity
    if identity is None:
        return {"on": False, "error": observer.identity_error}
    states: dict[str, int] = {"running": 0, "gap": 0, "ended": 0}
    for trace in identity.traces:
        states[trace.state.value] += 1
    return {
        "on": True,
        "error": None,
        "links": {source.value: n for source, n in identity.stats.links.items()},
        "traces": states,
        "blocks": identity.num_blocks,
        "expired": identity.stats.expired_traces,
        "evicted": identity.stats.evicted_traces,
        "forgotten_blocks": identity.stats.forgotten_blocks,
        "splits": identity.stats.splits,
    }


def _policy(scheduler: Any) -> dict[str, Any] | None:
    """What policy does; None where none was asked for."""
    if not hasattr(scheduler, "enforcer"):
        return None
    enforcer = scheduler.enforcer
    if enforcer is None:
        return {"on": False, "held": 0}
    return {
        "on": True,
        "held": enforcer.gate.num_held,
        "longest_wait_s": enforcer.longest_wait_s,
        "evicted_blocks": enforcer.free.evicted_blocks if enforcer.free is not None else None,
        "tiers": _tiers(enforcer.tiers.manager) if enforcer.tiers is not None else None,
        "nvme_io": _nvme_io(enforcer),
    }


def _tiers(manager: TierManager) -> dict[str, float]:
    """The tiers' figures as of now: an idle engine takes no other look at what the disk has done."""
    manager.poll()
    return manager.stats()


def _nvme_io(enforcer: Any) -> str | None:
    """What does the NVMe tier's I/O; None without such a tier."""
    nvme = enforcer.tiers.manager.nvme if enforcer.tiers is not None else None
    return nvme.store.io_name if nvme is not None else None


def _ledger(scheduler: Any) -> dict[str, Any] | None:
    """What the ledger does; None where none was asked for."""
    if getattr(scheduler, "bookkeeper", None) is not None:
        scheduler.note(Bookkeeper.tick)
    keeper = getattr(scheduler, "bookkeeper", None)
    if keeper is not None:
        return keeper.stats()
    error = getattr(scheduler, "bookkeeper_error", None)
    return {"on": False, "error": error} if error is not None else None


def _page(observer: Observer, page: dict[str, Any], now: float, block_tokens: int) -> dict[str, Any]:
    limit = max(1, min(int(page.get("limit") or MAX_ROWS), MAX_ROWS))
    if page.get("of") == "links":
        return {"block_tokens": block_tokens, **_links(observer, int(page.get("after") or 0), limit)}
    return _traces(observer, page.get("after"), page.get("state"), limit, now)


def _links(observer: Observer, after: int, limit: int) -> dict[str, Any]:
    """Answers in the order they were given. `next` asks for what comes after these."""
    links = observer.links(after, limit)
    rows = [
        {
            "number": number,
            "request_id": facts.client_id(answered.turn),
            "trace_id": (link := answered.link).trace_id,
            "parent_trace_id": link.parent_trace_id,
            "source": link.source.value,
            "confidence": link.confidence,
            "matched_blocks": link.matched_blocks,
            "prompt_tokens": answered.prompt_tokens,
            "cached_tokens": answered.cached_tokens,
            "previous_prompt_tokens": link.previous_prompt_tokens,
            "previous_tokens": link.previous_tokens,
        }
        for number, answered in links
    ]
    more = bool(links) and links[-1][0] < observer.num_links
    return {"rows": rows, "next": str(links[-1][0]) if more else None, "total": observer.num_links}


def _traces(observer: Observer, after: str | None, state: str | None, limit: int, now: float) -> dict[str, Any]:
    """Traces by age, oldest first, from behind the cursor `after` on."""
    identity = observer.identity
    if identity is None:
        return {"rows": [], "next": None, "total": 0}
    wanted = [t for t in identity.traces if state is None or t.state.value == state]
    behind = [t for t in wanted if after is None or _order(t) > _cursor(after)]
    shown = heapq.nsmallest(limit, behind, key=_order)
    cursor = f"{shown[-1].started_s!r}:{shown[-1].trace_id}" if len(behind) > len(shown) else None
    return {"rows": [_row(t, now) for t in shown], "next": cursor, "total": len(wanted)}


def _row(trace: Trace, now: float) -> dict[str, Any]:
    return {
        "trace_id": trace.trace_id,
        "parent_trace_id": trace.parent_trace_id,
        "children": sorted(trace.children),
        "state": trace.state.value,
        "session_id": trace.session_id,
        "tenant": trace.namespace.tenant,
        "adapter": trace.namespace.model,
        "turns": trace.num_turns,
        "tokens": trace.num_tokens,
        "source": trace.source.value,
        "confidence": trace.confidence,
        "age_s": now - trace.started_s,
        "silent_s": now - trace.last_event_s,
        "last_outcome": trace.last_outcome.value if trace.last_outcome is not None else None,
        "last_request_id": facts.client_id(trace.last_request_id),
    }


def _order(trace: Trace) -> tuple[float, str]:
    return trace.started_s, trace.trace_id


def _cursor(text: str) -> tuple[float, str]:
    started, _, trace_id = text.partition(":")
    return float(started), trace_id


def _age(then: float | None, now: float) -> float | None:
    return None if then is None else now - then

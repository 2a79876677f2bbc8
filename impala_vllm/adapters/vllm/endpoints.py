"""The routes under /impala: health, traces, links, hello, blocks, outcome. JSON, bounded, ids and hashes only."""

import base64
import json
import re
from http import HTTPStatus
from typing import Annotated, Any, NamedTuple
from urllib.parse import parse_qs

import msgspec

from impala_vllm.adapters.vllm import blocks, health, hello
from impala_vllm.adapters.vllm.engine import Engine
from impala_vllm.adapters.vllm.facts import bounded_id
from impala_vllm.adapters.vllm.snapshot import MAX_ROWS
from impala_vllm.core.traces import State

PREFIX = "/impala"
OPEN_PATHS = ("/impala/health",)
"""Answered without an API key, like vLLM's own /health: they say nothing about clients."""
OUTCOME_PATH = "/impala/outcome"
MAX_OUTCOME_BYTES = 8192
DEFAULT_ROWS = 100
_BLOCKS_AFTER = re.compile(r"[0-9a-f]{32}:[0-9]{1,12}")
_NO_BLOCKS = {
    "off": (HTTPStatus.CONFLICT, "KV events are off; start the server with --kv-events-config"),
    "busy": (HTTPStatus.SERVICE_UNAVAILABLE, "others are reading; come back in a minute"),
    "gone": (HTTPStatus.GONE, "this snapshot is no longer kept; begin again"),
}
_CURSORS = {"traces": re.compile(r"[0-9]{1,15}(\.[0-9]{1,20})?:t[0-9]{1,18}"), "links": re.compile(r"[0-9]{1,18}")}


class Answer(NamedTuple):
    """An HTTP response."""

    status: int
    body: bytes


async def answer(engine: Engine, path: str, query: str) -> Answer:
    """The response to GET `path`."""
    if path == "/impala/health":
        return await _health(engine)
    if path in ("/impala/traces", "/impala/links"):
        try:
            page = _page(path.rpartition("/")[2], parse_qs(query))
        except ValueError as e:
            return _json(HTTPStatus.BAD_REQUEST, {"error": str(e)})
        return await _rows(engine, page)
    if path == "/impala/hello":
        return await _hello(engine)
    if path == "/impala/blocks":
        try:
            page = _blocks_page(parse_qs(query))
        except ValueError as e:
            return _json(HTTPStatus.BAD_REQUEST, {"error": str(e)})
        return await _blocks(engine, page)
    known = ", ".join(f"{PREFIX}/{name}" for name in ("health", "traces", "links", "hello", "blocks"))
    return _json(HTTPStatus.NOT_FOUND, {"error": f"{path}: unknown; there are {known}, and POST {OUTCOME_PATH}"})


async def outcome(engine: Engine, tenant: str, body: bytes) -> Answer:
    """The response to POST /impala/outcome: how a trace of `tenant` ended, for the ledger."""
    try:
        asked = _outcome(body)
    except ValueError as e:
        return _json(HTTPStatus.BAD_REQUEST, {"error": str(e)})
    if engine.config.ledger.path is None:
        return _json(HTTPStatus.CONFLICT, {"error": "this server keeps no ledger; start it with --impala-ledger FILE"})
    found = await engine.outcome({**asked, "tenant": tenant})
    if found is None:
        return _json(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "the engine does not answer; see /impala/health"})
    num = sum(n or 0 for n in found)
    if not num:
        return _json(HTTPStatus.NOT_FOUND, {"error": "no such trace of this caller is known; it may be over"})
    return _json(HTTPStatus.OK, {"traces": num})


async def _health(engine: Engine) -> Answer:
    snapshots = await engine.snapshots()
    found = health.judge(snapshots, engine.silent_s, engine.is_dead, engine.config.health)
    stalled = found.status is health.Status.STALLED
    code = HTTPStatus.SERVICE_UNAVAILABLE if stalled else HTTPStatus.OK
    shown = ("rank", "running", "waiting", "steps", "last_step_age_s", "last_progress_age_s")
    ranks = [
        {**{name: s[name] for name in shown}, "nvme_io": (s["policy"] or {}).get("nvme_io")}
        for s in snapshots or []
        if s["observed"]
    ]
    mode = engine.config.mode.value
    return _json(code, {"status": found.status.value, "reasons": found.reasons, "mode": mode, "ranks": ranks})


async def _rows(engine: Engine, page: dict[str, Any]) -> Answer:
    snapshots = await engine.page(page)
    if snapshots is None:
        return _json(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "the engine does not answer; see /impala/health"})
    ranks = [{"rank": s["rank"], **s["page"]} for s in snapshots if s["observed"]]
    return _json(HTTPStatus.OK, {"ranks": ranks})


async def _hello(engine: Engine) -> Answer:
    answers = await engine.page({"of": "hello"})
    if answers is None:
        return _json(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "the engine does not answer; see /impala/health"})
    ranks = [answer["hello"] for answer in answers]
    return _json(HTTPStatus.OK, hello.describe(engine.vllm_config, ranks, engine.chats))


async def _blocks(engine: Engine, page: dict[str, Any]) -> Answer:
    """A page of `fleet.events.snapshot.Page`."""
    answers = await engine.page(page)
    if answers is None:
        return _json(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "the engine does not answer; see /impala/health"})
    found = next((a["blocks"] for a in answers if a["rank"] == page["rank"]), None)
    if found is None:
        return _json(HTTPStatus.NOT_FOUND, {"error": f"rank: there is no rank {page['rank']}"})
    if "error" in found:
        status, error = _NO_BLOCKS[found["error"]]
        return _json(status, {"error": error})
    return _json(HTTPStatus.OK, {**found, "keys": base64.b64encode(found["keys"]).decode()})


def _blocks_page(query: dict[str, list[str]]) -> dict[str, Any]:
    """As `_page`."""
    if unknown := sorted(set(query) - {"rank", "limit", "after"}):
        raise ValueError(f"{unknown[0]}: unknown parameter; there are after, limit, rank")
    values = {name: given[-1] for name, given in query.items()}
    limit, rank, after = values.get("limit", "5000"), values.get("rank", "0"), values.get("after")
    if not limit.isdecimal() or not 1 <= int(limit) <= blocks.MAX_BLOCKS:
        raise ValueError(f"limit: must be 1 to {blocks.MAX_BLOCKS}, not {limit!r}")
    if not rank.isdecimal() or len(rank) > 6:
        raise ValueError(f"rank: must be a number, not {rank!r}")
    if after is not None and not _BLOCKS_AFTER.fullmatch(after):
        raise ValueError(f"after: must be the `next` of an earlier answer, not {after!r}")
    return {"of": "blocks", "rank": int(rank), "limit": int(limit), "after": after}


def _page(of: str, query: dict[str, list[str]]) -> dict[str, Any]:
    """The query as the engine is asked. Raises ValueError, in one line, for what makes no sense."""
    known = {"limit", "after", "state"} if of == "traces" else {"limit", "after"}
    if unknown := sorted(set(query) - known):
        raise ValueError(f"{unknown[0]}: unknown parameter; there are {', '.join(sorted(known))}")
    values = {name: given[-1] for name, given in query.items()}
    limit = values.get("limit", str(DEFAULT_ROWS))
    if not limit.isdecimal() or not 1 <= int(limit) <= MAX_ROWS:
        raise ValueError(f"limit: must be 1 to {MAX_ROWS}, not {limit!r}")
    state = values.get("state")
    if state is not None and state not in {s.value for s in State}:
        raise ValueError(f"state: must be one of {', '.join(s.value for s in State)}, not {state!r}")
    after = values.get("after")
    if after is not None and not _CURSORS[of].fullmatch(after):
        raise ValueError(f"after: must be the `next` of an earlier answer, not {after!r}")
    return {"of": of, "limit": int(limit), "state": state, "after": after}


class _Outcome(msgspec.Struct, forbid_unknown_fields=True):
    outcome: Annotated[str, msgspec.Meta(pattern="^[a-z][a-z0-9_.-]{0,31}$")]
    session_id: str | None = None
    trace_id: str | None = None
    request_id: str | None = None
    score: float | None = None


def _outcome(body: bytes) -> dict[str, Any]:
    """The body as the engine is asked. Raises ValueError, in one line, for what makes no sense."""
    try:
        given = msgspec.json.decode(body, type=_Outcome)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        shape = '{"outcome": "success", "session_id" or "trace_id" or "request_id": "..."}'
        raise ValueError(f"body: {' '.join(str(e).split())}; send {shape}") from None
    names = {"session_id": given.session_id, "trace_id": given.trace_id, "request_id": given.request_id}
    named = {name: bounded_id(value) for name, value in names.items() if value}
    if len(named) != 1:
        raise ValueError(f"body: names {len(named)} of session_id, trace_id and request_id; send exactly one")
    return {"outcome": given.outcome, "score": given.score, **named}


def _json(status: int, data: dict[str, Any]) -> Answer:
    return Answer(int(status), json.dumps(data).encode())

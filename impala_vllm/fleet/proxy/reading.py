"""From an HTTP request to a `Turn`: JSON, tokens and hashes, in worker threads where that takes longer than a hop."""

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any, NamedTuple, cast

import msgspec

from impala_vllm import caller as callers
from impala_vllm.config import MetadataConfig
from impala_vllm.core.types import Namespace
from impala_vllm.fleet.fleet import Fleet, Serving
from impala_vllm.fleet.hashing import Prompt
from impala_vllm.fleet.router import Turn

logger = logging.getLogger("impala.fleet")

MAX_NAME_CHARS = 128
BYTES_A_TOKEN = 4
"""Of a body that could not be tokenised."""
_BEGIN_WITH_TOKENS = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Streams of other routes begin with an event before the prompt has been computed."""
NUM_WORKERS = 4
MAX_DECODED_HERE = 64 << 10
MAX_HASHED_HERE = 2 << 10
"""Bytes of a body up to which the event loop does it: a fifth of a millisecond, and a hop waits for its turn twice."""


MAX_DECODED = 16 << 20
"""Bytes of a body of which more is decoded than its outlines. Nothing else runs meanwhile, in whatever thread it is."""
MAX_OPENED = 250_000
"""Brackets and braces of one that is not small: each may be an object to make, a third of a microsecond."""


class _Outlines(msgspec.Struct):
    model: Any = None
    stream: Any = None
    session_id: Any = None
    cache_salt: Any = None
    previous_response_id: Any = None
    metadata: Any = None
    litellm_session_id: Any = None
    prompt_cache_key: Any = None


_outlines = msgspec.json.Decoder(_Outlines)


class Read(NamedTuple):
    """A request, understood as far as routing needs."""

    turn: Turn
    model: str | None
    """As the request names it."""
    serving: Serving
    is_stream: bool
    previous_response: str | None = None
    """The stored answer that it goes on from."""


class Reader:
    """Owns the worker threads ("impala-reads")."""

    def __init__(self, fleet: Fleet, metadata: MetadataConfig) -> None:
        self._fleet = fleet
        self._metadata = metadata
        self._workers = ThreadPoolExecutor(NUM_WORKERS, "impala-reads")

    async def read(self, path: str, headers: Mapping[str, str], body: bytes) -> Read:
        """Never raises for what a client sent: what is not understood is routed by load, for the engine to refuse."""
        caller = callers.from_headers(headers, self._metadata)
        loop = asyncio.get_running_loop()
        if len(body) <= MAX_DECODED_HERE:
            fields = _decode(body)
        else:
            fields = await loop.run_in_executor(self._workers, _decode, body)
        if len(body) <= callers.MAX_BODY_BYTES:  # as the engine does it
            callers.add_fields(caller, fields, self._metadata)
        model = fields.get("model") if isinstance(fields.get("model"), str) else None
        serving = self._fleet.serving(model)
        prompt: Prompt | None = None
        if serving.family is not None and serving.family.prompts is not None and fields:
            if len(body) <= MAX_HASHED_HERE:
                prompt = _hash(serving, path, fields)
            else:
                prompt = await loop.run_in_executor(self._workers, _hash, serving, path, fields)
        is_stream = fields.get("stream") is True
        session = headers.get("x-session-id") or fields.get("session_id")
        turn = Turn(
            Namespace(_short(caller.tenant) or "", _short(fields.get("cache_salt")) or "", _short(model) or ""),
            prompt,
            serving.family.scheme.block_tokens if serving.family is not None else 16,
            prompt.num_tokens if prompt is not None else _guess(body, serving),
            _short(session if isinstance(session, str) and not caller.wins else caller.session),
            _short(caller.parent),
            is_stream and path in _BEGIN_WITH_TOKENS,
        )
        previous = fields.get("previous_response_id") if path == "/v1/responses" else None
        return Read(turn, model, serving, is_stream, previous if isinstance(previous, str) else None)

    def close(self) -> None:
        """End the workers."""
        self._workers.shutdown(wait=False, cancel_futures=True)


def _guess(body: bytes, serving: Serving) -> int:
    """Tokens of a prompt that is not known: an image is no text, so no more than the model takes."""
    num_tokens = len(body) // BYTES_A_TOKEN
    if serving.family is not None:
        num_tokens = min(num_tokens, serving.family.hello.max_model_len)
    return max(1, num_tokens)


def _short(name: object) -> str | None:
    """What is kept of a client's word: a long one becomes its digest. None where there is none."""
    if not isinstance(name, str) or not name:
        return None
    return name if len(name) <= MAX_NAME_CHARS else blake2b(name.encode("utf-8", "surrogatepass")).hexdigest()


def _decode(body: bytes) -> dict[str, Any]:
    """What the body says; of one that is too large to be a prompt, which model it is for and such."""
    try:
        if _is_costly(body):
            return msgspec.structs.asdict(_outlines.decode(body))
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return cast("dict[str, Any]", fields) if isinstance(fields, dict) else {}


def _is_costly(body: bytes) -> bool:
    if len(body) > MAX_DECODED:
        return True
    return len(body) > MAX_DECODED_HERE and body.count(b"[") + body.count(b"{") > MAX_OPENED


def _hash(serving: Serving, path: str, fields: Mapping[str, Any]) -> Prompt | None:
    assert serving.family is not None
    prompts = serving.family.prompts
    assert prompts is not None
    find = {
        "/v1/chat/completions": prompts.of_chat,
        "/v1/completions": prompts.of_completion,
        "/v1/responses": prompts.of_response,
    }.get(path)
    try:
        return find(fields, serving.adapter) if find is not None else None
    except Exception as e:  # whatever a malformed body does to a tokenizer; its text stays out of the log
        logger.warning("a prompt could not be hashed (%s)", type(e).__name__)
        return None

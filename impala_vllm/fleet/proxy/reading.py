"""From an HTTP request to a `Turn`: JSON, tokens and hashes in worker threads, so that streams go on meanwhile."""

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import msgspec

from impala_vllm import caller as callers
from impala_vllm.config import MetadataConfig
from impala_vllm.core.types import Namespace
from impala_vllm.fleet.fleet import Fleet, Serving
from impala_vllm.fleet.hashing import Prompt
from impala_vllm.fleet.router import Turn

logger = logging.getLogger("impala.fleet")

BYTES_A_TOKEN = 4
"""Of a body that could not be tokenised."""
NUM_WORKERS = 4


class Read(NamedTuple):
    """A request, understood as far as routing needs."""

    turn: Turn
    serving: Serving
    is_stream: bool


class Reader:
    """Owns the worker threads ("impala-reads")."""

    def __init__(self, fleet: Fleet, metadata: MetadataConfig) -> None:
        self._fleet = fleet
        self._metadata = metadata
        self._workers = ThreadPoolExecutor(NUM_WORKERS, "impala-reads")

    async def read(self, path: str, headers: Mapping[str, str], body: bytes) -> Read:
        """Never raises for what a client sent: what is not understood is routed by load, for the engine to refuse."""
        caller = callers.from_headers(headers, self._metadata)
        callers.add_body(caller, body, self._metadata)
        loop = asyncio.get_running_loop()
        fields = await loop.run_in_executor(self._workers, _decode, body)
        model = fields.get("model") if isinstance(fields.get("model"), str) else None
        serving = self._fleet.serving(model)
        prompt: Prompt | None = None
        if serving.family is not None and serving.family.prompts is not None and fields:
            prompt = await loop.run_in_executor(self._workers, _hash, serving, path, fields)
        salt = fields.get("cache_salt")
        session = headers.get("x-session-id") or fields.get("session_id")
        turn = Turn(
            Namespace(caller.tenant, salt if isinstance(salt, str) else "", model or ""),
            prompt,
            serving.family.scheme.block_tokens if serving.family is not None else 16,
            prompt.num_tokens if prompt is not None else max(1, len(body) // BYTES_A_TOKEN),
            session if isinstance(session, str) and not caller.wins else caller.session,
            caller.parent,
        )
        return Read(turn, serving, fields.get("stream") is True)

    def close(self) -> None:
        """End the workers."""
        self._workers.shutdown(wait=False, cancel_futures=True)


def _decode(body: bytes) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return cast("dict[str, Any]", fields) if isinstance(fields, dict) else {}


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

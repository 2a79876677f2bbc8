"""vLLM's requests as the facts core is told: arrivals, finishes, namespaces."""

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from impala_vllm.core.types import Arrival, Finish, Namespace, Outcome, RequestId

if TYPE_CHECKING:
    from vllm.v1.request import Request

CALLER_KEY = "impala"
"""Where the middleware leaves the caller in `sampling_params.extra_args`: a dict, which no client can send there."""
ENDING_TOKENS = 64
"""Of a prompt, digested to tell prompts apart that differ behind their last full block."""
MAX_ID_CHARS = 256

_RANDOM_SUFFIX = re.compile(r"-[0-9a-f]{8}$")
"""vLLM appends it to every request id; what is left is the id the client was given."""
_CHILD = re.compile(r"\d+_(?=.)")
_OUTCOMES = {
    "stop": Outcome.STOP,
    "length": Outcome.LENGTH,
    "abort": Outcome.ABORT,
    "error": Outcome.ERROR,
    "repetition": Outcome.LENGTH,
}


def turn_id(request: "Request") -> RequestId:
    """The turn a request belongs to. `n > 1` makes children `0_ID`, `1_ID`...: one turn, one id."""
    return RequestId(_CHILD.sub("", request.request_id, count=1))


def client_id(turn: RequestId) -> str:
    """The id that the client was given."""
    return _RANDOM_SUFFIX.sub("", turn)


def arrival(request: "Request") -> Arrival:
    """The request as it arrived. Its hashes are copied: vLLM appends to them while it generates."""
    caller = _caller(request)
    return Arrival(
        request_id=turn_id(request),
        blocks=tuple(request.block_hashes),
        num_tokens=request.num_prompt_tokens,
        namespace=Namespace(
            tenant=str(caller.get("tenant") or ""),
            salt=request.cache_salt or "",
            model=_adapter(request),
        ),
        session_id=bounded_id(caller.get("session") or request.session_id),
        parent_session_id=bounded_id(caller.get("parent")),
        ending=hash(tuple(request.prompt_token_ids[-ENDING_TOKENS:])) if request.prompt_token_ids else 0,
    )


def finish(request: "Request", tool_call_tokens: frozenset[int]) -> Finish:
    """How the request ended. Counts and hashes cover final tokens only, never placeholders."""
    return Finish(
        request_id=turn_id(request),
        blocks=tuple(request.block_hashes),
        num_tokens=request.num_tokens,
        outcome=outcome(request, tool_call_tokens),
    )


def outcome(request: "Request", tool_call_tokens: frozenset[int]) -> Outcome:
    """How the request ended."""
    found = _OUTCOMES.get(str(request.get_finished_reason()), Outcome.UNKNOWN)
    if found is Outcome.ABORT and request.sampling_params is not None and request.sampling_params.stop:
        return Outcome.UNKNOWN  # a stop string is found by the front-end, which then aborts: not a disconnect
    if found is Outcome.STOP and tool_call_tokens and not tool_call_tokens.isdisjoint(request.output_token_ids):
        return Outcome.TOOL_CALL
    return found


def called(request: "Request", tool_call_tokens: frozenset[int], window: int = 16) -> list[int]:
    """The first output tokens after the tool-call marker; empty without one. O(output), once a turn."""
    if not tool_call_tokens:
        return []
    output = request.output_token_ids
    marker = next((i for i, token in enumerate(output) if token in tool_call_tokens), None)
    return [] if marker is None else list(output[marker + 1 : marker + 1 + window])


def has_session(request: "Request") -> bool:
    """Whether the client said which trace this is."""
    return bool(_caller(request).get("session") or request.session_id)


def bounded_id(value: object) -> str | None:
    """A client's id, short enough to keep: a long one becomes its digest. None where there is none."""
    if not isinstance(value, str) or not value:
        return None
    return value if len(value) <= MAX_ID_CHARS else hashlib.sha256(value.encode()).hexdigest()


def _caller(request: "Request") -> Mapping[str, Any]:
    extra = request.sampling_params.extra_args if request.sampling_params is not None else None
    caller = extra.get(CALLER_KEY) if extra else None
    return caller if isinstance(caller, dict) else {}


def _adapter(request: "Request") -> str:
    lora = request.lora_request
    return f"{lora.lora_name}:{lora.lora_int_id}:{lora.lora_path}" if lora is not None else ""

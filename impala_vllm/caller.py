"""Who sends a request: tenant, trace, parent trace, from headers and body of the HTTP request.

Header names as the harnesses send them (their own documentation and source, checked 2026):
Claude Code https://code.claude.com/docs/en/llm-gateway-protocol (agent ids since 2.1.139),
Codex https://github.com/openai/codex `codex-rs/codex-api/src/requests/headers.rs` (a root and its sub-agents
share session-id and prompt_cache_key, each has a thread-id of its own), OpenCode
https://github.com/sst/opencode `packages/opencode/src/session`, LiteLLM
https://docs.litellm.ai/docs/a2a_iteration_budgets, Qwen Code https://github.com/QwenLM/qwen-code/issues/4384.

`prompt_cache_key` is a hint, not a trace: OpenAI means it for requests that share a prefix, applications
send one a user or one an app. It counts only where the configuration says that clients send one a session.
`user` and `safety_identifier` name people, not traces, and are not read.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from impala_vllm.config import MetadataConfig

MAX_BODY_BYTES = 32 << 20
"""Bodies above this (images in base64) are not searched for ids."""

_SESSION_HEADERS = (
    "x-opencode-session",
    "x-qwen-code-session-id",
    "x-litellm-session-id",
    "x-grok-conv-id",
    "x-session-affinity",
    "session-id",
    "session_id",  # Codex until 2026
)
_PARENT_HEADERS = ("x-parent-session-id", "x-opencode-parent-session")


@dataclass(slots=True)
class Caller:
    """What a request says about where it comes from."""

    tenant: str = ""
    session: str | None = None
    """The harness's own name of the trace."""
    parent: str | None = None
    wins: bool = False
    """Whether `session` goes before vLLM's own `session_id`: the operator configured its header."""

    def envelope(self, session_id: str | None) -> dict[str, str]:
        """What the engine is sent, given vLLM's own session id of the request."""
        session = self.session if self.wins or not session_id else session_id
        fields = {"tenant": self.tenant, "session": session, "parent": self.parent}
        return {name: value for name, value in fields.items() if value}


def from_headers(headers: Mapping[str, str], config: MetadataConfig) -> Caller:
    """Read the headers (names in lower case)."""
    caller = Caller(tenant=_tenant(headers, config))
    for name in config.session_headers:
        if value := _clean(headers.get(name.lower())):
            caller.session, caller.wins = value, True
            return caller
    if session := _clean(headers.get("x-claude-code-session-id")):
        return _claude_code(caller, session, headers)
    if "session-id" in headers and (thread := _clean(headers.get("thread-id"))):
        caller.session, caller.parent = thread, _clean(headers.get("x-codex-parent-thread-id"))
        return caller
    caller.session = next((v for name in _SESSION_HEADERS if (v := _clean(headers.get(name)))), None)
    caller.parent = next((v for name in _PARENT_HEADERS if (v := _clean(headers.get(name)))), None)
    return caller


def add_body(caller: Caller, body: bytes, config: MetadataConfig) -> None:
    """Fill in what only the body says. Never raises: a body that is not as expected says nothing."""
    if caller.session is not None or len(body) > MAX_BODY_BYTES:
        return
    if b'"metadata"' not in body and b'"litellm_session_id"' not in body and b'"prompt_cache_key"' not in body:
        return
    try:
        fields = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    _add(caller, fields.metadata, fields.litellm_session_id, fields.prompt_cache_key, config)


def add_fields(caller: Caller, fields: Mapping[str, Any], config: MetadataConfig) -> None:
    """`add_body` of a body that has been decoded."""
    if caller.session is None:
        said = fields.get("metadata"), fields.get("litellm_session_id"), fields.get("prompt_cache_key")
        _add(caller, *said, config)


class _Body(msgspec.Struct):
    metadata: Any = None
    litellm_session_id: Any = None
    prompt_cache_key: Any = None


_decoder = msgspec.json.Decoder(_Body)


def _add(caller: Caller, metadata: Any, litellm: Any, cache_key: Any, config: MetadataConfig) -> None:
    said = cast("dict[Any, Any]", metadata) if isinstance(metadata, dict) else {}
    session = _clean(said.get("session_id")) or _clean(litellm) or _claude_user(said)
    if session is None and config.prompt_cache_key_is_session:
        session = _clean(cache_key)
    caller.session = session


def _claude_code(caller: Caller, session: str, headers: Mapping[str, str]) -> Caller:
    """A sub-agent shares its session's id and adds its own; the main agent sends no agent id."""
    agent = _clean(headers.get("x-claude-code-agent-id"))
    parent = _clean(headers.get("x-claude-code-parent-agent-id"))
    caller.session = f"{session}/{agent}" if agent else session
    if agent:
        caller.parent = f"{session}/{parent}" if parent else session
    return caller


def _claude_user(metadata: Mapping[Any, Any]) -> str | None:
    """Claude Code before its session header: metadata.user_id is `user_..._session_UUID`."""
    user = metadata.get("user_id")
    if not isinstance(user, str) or "_session_" not in user:
        return None
    return _clean(user.rpartition("_session_")[2])


def _tenant(headers: Mapping[str, str], config: MetadataConfig) -> str:
    """The gateway's word where one is trusted, else a digest of the API key; "" without either."""
    if config.tenant_header is not None:
        return _clean(headers.get(config.tenant_header.lower())) or ""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return hashlib.sha256(b"impala tenant\0" + key.encode("utf-8", "replace")).hexdigest()[:16] if key else ""


def _clean(value: object) -> str | None:
    """A usable id: text without control characters, not blank."""
    if not isinstance(value, str) or not (text := value.strip()) or not text.isprintable():
        return None
    return text

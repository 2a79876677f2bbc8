"""Requests out of logs of messages, one at a time, still undecoded: who wants a message decodes it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec

from impala_vllm.insight.audit.kinds import Kind
from impala_vllm.workload.source import BAD_JSON, OnError, WorkloadError, bad_line, lines, whole


@dataclass(slots=True)
class Request:
    """One line of a log, its messages as they stand there."""

    request_id: str
    session: str | None
    """What the client or the file says; None where traces must be recognised."""
    messages: list[msgspec.Raw] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    """Hashes of the messages' bytes."""
    text: str | None = None
    """The rendered prompt, where the log has that instead of messages."""
    tools: msgspec.Raw | None = None
    output: Any = None
    has_format: bool | None = None
    """Whether it asked for structured output; None where the log cannot say."""
    model: str = ""
    tenant: str = ""
    salt: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """As the server counted them."""


class _Chat(msgspec.Struct):
    messages: list[msgspec.Raw]
    request_id: str = ""
    session_id: str | None = None
    trace_id: str | None = None
    model: str | None = None
    tenant: str | None = None
    tools: msgspec.Raw = msgspec.Raw()
    response_format: msgspec.Raw = msgspec.Raw()
    output: Any = None
    cache_salt: str | None = None
    cached_tokens: Any = None
    usage: Any = None


class _Step(msgspec.Struct):
    input: str
    output: str = ""
    session_id: str = ""
    model: str | None = None


class _Role(msgspec.Struct):
    role: str = ""


class _Trajectory(msgspec.Struct):
    task_id: int | str
    traj: list[msgspec.Raw]
    trial: int = 0


def read(file: Path, kind: Kind, skip: OnError) -> Iterator[Request]:
    """Requests in the file's order. Memory: a line, or the file where it is one document.

    A line may be of the other kind: a log outlives the version of what writes it.
    """
    if kind is Kind.TRAJECTORIES:
        yield from _trajectories(file, skip)
        return
    readers: list[Callable[[bytes, str, Path], Request]] = [_chat, _step]
    if kind is Kind.STEPS:
        readers.reverse()
    for line in lines(file):
        try:
            yield readers[0](line.data, line.where, file)
        except BAD_JSON as e:
            try:
                request = readers[1](line.data, line.where, file)
            except BAD_JSON:
                skip(bad_line(line.where, e))
                continue
            readers.reverse()
            yield request


def role(message: msgspec.Raw) -> str:
    """Of a message. Raises DecodeError or ValidationError."""
    return _ROLE.decode(message).role


_CHAT = msgspec.json.Decoder(_Chat)
_STEP = msgspec.json.Decoder(_Step)
_ROLE = msgspec.json.Decoder(_Role)
_NOTHING = (b"", b"null")


def _chat(data: bytes, where: str, _file: Path) -> Request:
    chat = _CHAT.decode(data)
    prompt_tokens, cached_tokens = _usage(chat.usage)
    return Request(
        request_id=chat.request_id or where,
        session=chat.session_id or chat.trace_id,
        messages=chat.messages,
        keys=[hash(bytes(raw)) for raw in chat.messages],
        tools=None if bytes(chat.tools) in _NOTHING else chat.tools,
        output=chat.output,
        has_format=bytes(chat.response_format) not in _NOTHING,
        model=chat.model or "",
        tenant=chat.tenant or "",
        salt=chat.cache_salt or "",
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens if chat.cached_tokens is None else _count(chat.cached_tokens),
    )


def _step(data: bytes, where: str, file: Path) -> Request:
    """Of a log with one session a file, in the order its calls ended."""
    step = _STEP.decode(data)
    return Request(
        where, step.session_id or file.name, text=step.input, output=step.output or None, model=step.model or ""
    )


def _trajectories(file: Path, skip: OnError) -> Iterator[Request]:
    try:
        runs = msgspec.json.decode(whole(file), type=list[_Trajectory])
    except BAD_JSON as e:
        skip(bad_line(f"{file}:1", e))
        return
    for place, run in enumerate(runs):
        session = f"{file.name}.task{run.task_id}.{run.trial}.{place}"
        keys = [hash(bytes(message)) for message in run.traj]
        for i, message in enumerate(run.traj):
            try:
                assistant = role(message) == "assistant"
            except BAD_JSON as e:
                skip(WorkloadError(f"{file}: {session}, message {i + 1}: {e}; mend or remove that run"))
                break
            if assistant:
                yield Request(f"{session}#{i}", session, run.traj[:i], keys[:i], output=msgspec.json.decode(message))


def _usage(usage: Any) -> tuple[int | None, int | None]:
    """Prompt tokens, and those of them that were cached, as OpenAI's API or Anthropic's has them."""
    if not isinstance(usage, dict):
        return None, None
    fields = cast("dict[str, Any]", usage)
    details = fields.get("prompt_tokens_details")
    inner = cast("dict[str, Any]", details) if isinstance(details, dict) else {}
    cached = inner.get("cached_tokens", fields.get("cache_read_input_tokens"))
    return _count(fields.get("prompt_tokens")), _count(cached)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

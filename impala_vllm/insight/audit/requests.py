"""Requests out of logs of messages, one at a time, still undecoded: who wants a message decodes it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, cast

import msgspec

from impala_vllm.workload.source import BAD_JSON, OnError, WorkloadError, bad_line, files, lines, records, whole

_LOOKED_AT = 100
"""So many first lines may be corrupt until a log counts as none."""


class Kind(Enum):
    """What a file holds, by the keys of its records."""

    CHATS = frozenset({"messages"})
    STEPS = frozenset({"input", "timestamp"})
    TRAJECTORIES = frozenset({"traj"})
    REQUESTS = frozenset({"block_ids", "arrival_s"})
    WEKA = frozenset({"requests", "block_size"})
    MOONCAKE = frozenset({"hash_ids", "timestamp"})

    @property
    def is_text(self) -> bool:
        """Whether it says what was in the prompts."""
        return self in (Kind.CHATS, Kind.STEPS, Kind.TRAJECTORIES)


@dataclass(slots=True)
class Request:
    """One line of a log, its messages as they stand there."""

    request_id: str
    session: str | None
    """What the client or the file says; None where traces must be recognised."""
    messages: list[msgspec.Raw] = field(default_factory=list)
    text: str | None = None
    """The rendered prompt, where the log has that instead of messages."""
    tools: msgspec.Raw | None = None
    output: Any = None
    model: str = ""
    tenant: str = ""
    salt: str = ""
    arrival_s: float = 0.0


class _Chat(msgspec.Struct):
    messages: list[msgspec.Raw]
    request_id: str = ""
    arrival_s: float = 0.0
    session_id: str | None = None
    model: str | None = None
    tenant: str | None = None
    tools: msgspec.Raw = msgspec.Raw()
    output: Any = None
    cache_salt: str | None = None


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


def kinds(path: Path, skip: OnError) -> list[tuple[Path, Kind]]:
    """The files of a log and what they hold; a file that holds none of it goes to `skip`."""
    found: list[tuple[Path, Kind]] = []
    for file in files(path):
        kind = _kind(file)
        if kind is None:
            skip(WorkloadError(f"{file}: no known log format; give a log of messages or of block ids"))
        else:
            found.append((file, kind))
    return found


def read(file: Path, kind: Kind, skip: OnError) -> Iterator[Request]:
    """Requests in the file's order. Memory: a line, or the file where it is one document."""
    reader: Callable[[Path, OnError], Iterator[Request]] = {
        Kind.CHATS: _chats, Kind.STEPS: _steps, Kind.TRAJECTORIES: _trajectories,
    }[kind]  # fmt: skip
    return reader(file, skip)


def _kind(file: Path) -> Kind | None:
    for number, line in enumerate(lines(file)):
        kind = _of(line.data)
        if kind is None and number == 0 and line.data[:1] in (b"[", b"{"):  # one document over many lines?
            kind = _of(whole(file))
        if kind is not None or number >= _LOOKED_AT:
            return kind
    return None


def _of(data: bytes) -> Kind | None:
    try:
        record = msgspec.json.decode(data)
    except BAD_JSON:
        return None
    if isinstance(record, list):
        items = cast("list[Any]", record)
        record = items[0] if items else None
        return Kind.TRAJECTORIES if isinstance(record, dict) and "traj" in record else None
    if not isinstance(record, dict):
        return None
    keys = cast("dict[str, Any]", record).keys()
    return next((kind for kind in Kind if kind is not Kind.TRAJECTORIES and keys >= kind.value), None)


def _chats(file: Path, skip: OnError) -> Iterator[Request]:
    for chat, where in records(file, msgspec.json.Decoder(_Chat), skip):
        yield Request(
            request_id=chat.request_id or where,
            session=chat.session_id,
            messages=chat.messages,
            tools=chat.tools if bytes(chat.tools) else None,
            output=chat.output,
            model=chat.model or "",
            tenant=chat.tenant or "",
            salt=chat.cache_salt or "",
            arrival_s=chat.arrival_s,
        )


def _steps(file: Path, skip: OnError) -> Iterator[Request]:
    """One session a file, in the order its calls ended."""
    for step, where in records(file, msgspec.json.Decoder(_Step), skip):
        session = step.session_id or file.name
        yield Request(where, session, text=step.input, output=step.output, model=step.model or "")


def _trajectories(file: Path, skip: OnError) -> Iterator[Request]:
    try:
        runs = msgspec.json.decode(whole(file), type=list[_Trajectory])
    except BAD_JSON as e:
        skip(bad_line(f"{file}:1", e))
        return
    role = msgspec.json.Decoder(_Role)
    for place, run in enumerate(runs):
        session = f"{file.name}.task{run.task_id}.{run.trial}.{place}"
        for i, message in enumerate(run.traj):
            try:
                assistant = role.decode(message).role == "assistant"
            except BAD_JSON as e:
                skip(bad_line(f"{file}:1", e))
                break
            if assistant:
                yield Request(f"{session}#{i}", session, messages=run.traj[:i], output=None)

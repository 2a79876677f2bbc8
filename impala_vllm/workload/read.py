"""One way in for every log format: name it or let the first record tell."""

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, cast

import msgspec

from impala_vllm.workload import azure, messages, mooncake, requests, weka
from impala_vllm.workload.source import BAD_JSON, OnError, WorkloadError, fail, files, lines, whole
from impala_vllm.workload.text_blocks import BLOCK_TOKENS
from impala_vllm.workload.turn import Turn


class Format(Enum):
    """Log formats; `auto` looks at the first record of each file."""

    AUTO = "auto"
    REQUESTS = "requests"
    WEKA = "weka"
    MOONCAKE = "mooncake"
    MESSAGES = "messages"
    AZURE = "azure"


class _Kind(Enum):
    REQUESTS = Format.REQUESTS
    WEKA = Format.WEKA
    MOONCAKE = Format.MOONCAKE
    AZURE = Format.AZURE
    CHATS = "chat requests"
    STEPS = "agent trace"
    TRAJECTORIES = "trajectories"


_MESSAGES = (_Kind.CHATS, _Kind.STEPS, _Kind.TRAJECTORIES)


def load(path: str | Path, format: Format | str = Format.AUTO, block_tokens: int = BLOCK_TOKENS) -> list[Turn]:
    """All turns in order of arrival. Raises WorkloadError also where there is nothing to recognise a trace by."""
    turns = sorted(read(path, format, block_tokens=block_tokens), key=lambda turn: turn.arrival_s)
    if not turns:
        raise WorkloadError(f"{path}: no request in it; give a log with at least one")
    if not any(turn.blocks for turn in turns) and not any(turn.session_id for turn in turns):
        raise WorkloadError(f"{path}: no prompt fills a block, so nothing can be recognised; give a log with prompts")
    return turns


def read(
    path: str | Path,
    format: Format | str = Format.AUTO,
    on_error: OnError = fail,
    *,
    block_tokens: int = BLOCK_TOKENS,
) -> Iterator[Turn]:
    """Turns of a log file or a directory of them, plain or zstandard.

    `block_tokens` is the size of the blocks that logs of text are cut into; logs of block ids have their own.

    Raises WorkloadError at the first bad line, unless `on_error` returns: then that line is left out.
    Turns of one recording come in order of arrival; see `interleave` to merge recordings.
    """
    wanted = Format(format)
    found = files(Path(path))
    kinds = [_kind(file, wanted) for file in found]
    sessions = [file for file, kind in zip(found, kinds, strict=True) if kind is _Kind.WEKA]
    yield from weka.read(sessions, on_error)
    for file, kind in zip(found, kinds, strict=True):
        if kind is _Kind.REQUESTS:
            yield from requests.read(file, on_error)
        elif kind is _Kind.MOONCAKE:
            yield from mooncake.read(file, on_error)
        elif kind is _Kind.AZURE:
            yield from azure.read(file, on_error)
        elif kind is _Kind.CHATS:
            yield from messages.read_chats(file, on_error, block_tokens)
        elif kind is _Kind.STEPS:
            yield from messages.read_steps(file, on_error, block_tokens)
        elif kind is _Kind.TRAJECTORIES:
            yield from messages.read_trajectories(file, on_error, block_tokens)


def _kind(file: Path, wanted: Format) -> _Kind:
    """What the file holds, by its first record; raises if that is not what the caller named."""
    if wanted not in (Format.AUTO, Format.MESSAGES):
        return _Kind(wanted)
    first = next(lines(file), None)
    if first is None:
        raise WorkloadError(f"{file}: the file is empty; give a log with at least one request")
    kind = _guess(first.data, file)
    if kind is None:
        raise WorkloadError(f"{first.where}: no known log format; name it with --format or convert the log")
    if wanted is Format.MESSAGES and kind not in _MESSAGES:
        raise WorkloadError(f"{first.where}: not a messages log; leave out --format messages")
    return kind


def _guess(first: bytes, file: Path) -> _Kind | None:
    if first.startswith(azure.HEADER):
        return _Kind.AZURE
    try:
        record = msgspec.json.decode(first)
    except BAD_JSON:
        try:  # a document over many lines
            record = msgspec.json.decode(whole(file)) if first[:1] in (b"[", b"{") else None
        except BAD_JSON:
            return None
    if isinstance(record, list):
        items = cast("list[Any]", record)
        return _Kind.TRAJECTORIES if items and isinstance(items[0], dict) and "traj" in items[0] else None
    if not isinstance(record, dict):
        return None
    keys = cast("dict[str, Any]", record).keys()
    for kind, needed in (
        (_Kind.REQUESTS, {"block_ids", "arrival_s"}),
        (_Kind.WEKA, {"requests", "block_size"}),
        (_Kind.MOONCAKE, {"hash_ids", "timestamp"}),
        (_Kind.CHATS, {"messages", "arrival_s"}),
        (_Kind.STEPS, {"input", "timestamp"}),
    ):
        if needed <= keys:
            return kind
    return None

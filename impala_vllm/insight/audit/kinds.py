"""What the files of a log hold, told by the keys of their records."""

from enum import Enum
from pathlib import Path
from typing import Any, cast

import msgspec

from impala_vllm.workload.source import BAD_JSON, OnError, WorkloadError, files, lines, whole


class Kind(Enum):
    """The keys that every record of a kind has."""

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


def kinds(path: Path, skip: OnError) -> list[tuple[Path, Kind]]:
    """The files of a log and what they hold; a file that holds none of it goes to `skip`."""
    found: list[tuple[Path, Kind]] = []
    for file in files(path, skip):
        try:
            found.append((file, _kind(file)))
        except WorkloadError as e:
            skip(e)
    return found


def _kind(file: Path) -> Kind:
    """Of the first line that says so. Raises WorkloadError where none does. O(lines that are corrupt)."""
    is_empty = True
    for line in lines(file):
        kind = _of(line.data)
        if kind is None and is_empty and line.data[:1] in (b"[", b"{"):  # one document over many lines?
            kind = _of(whole(file))
        if kind is not None:
            return kind
        is_empty = False
    if is_empty:
        raise WorkloadError(f"{file}: the file is empty; give a log with at least one request")
    raise WorkloadError(f"{file}: no known log format; give a log of messages or of block ids, a request a line")


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

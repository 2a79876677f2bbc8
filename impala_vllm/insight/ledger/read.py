"""Reads ledgers back, line by line: FILE with its rotated and live neighbours, oldest first.

What cannot be read is counted and named once, never raised: torn lines, other versions, files that went away meanwhile.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from impala_vllm.insight.ledger.record import VERSION, Line

MAX_LINE_BYTES = 1 << 20
"""Longer lines are none of ours: the longest record has a thousand rows of 50 bytes."""
_BUFFER_BYTES = 1 << 20


@dataclass(slots=True)
class Reading:
    """What was read so far."""

    files: list[Path] = field(default_factory=list[Path])
    lines: int = 0
    corrupt: int = 0
    """Lines that are no record: torn, or something else's."""
    newer: int = 0
    """Records of a version that this one does not know."""
    first_problem: str | None = None

    def problem(self, text: str) -> None:
        """Note a problem; the first one is shown."""
        self.first_problem = self.first_problem or text


class _Versioned(msgspec.Struct):
    v: int = 1


_decode = msgspec.json.Decoder(Line).decode
_decode_version = msgspec.json.Decoder(_Versioned).decode


def neighbours(path: Path) -> list[Path]:
    """FILE.2, FILE.1, FILE, FILE.live, as far as they are there: the order in which they were written."""
    prefix = path.name + "."
    rotated = [p for p in path.parent.glob(path.name.translate(_LITERAL) + ".*") if p.name[len(prefix) :].isdecimal()]
    rotated.sort(key=lambda p: int(p.name[len(prefix) :]), reverse=True)
    live = path.parent / f"{path.name}.live"  # of a path without a name, too
    return [p for p in (*rotated, path, live) if os.path.isfile(p)]


_LITERAL = {ord(c): f"[{c}]" for c in "*?["}


def read(path: Path, reading: Reading, on_bytes: Callable[[int], None] | None = None) -> Iterator[Line]:
    """Every usable line of FILE and its neighbours. Raises OSError only where FILE itself cannot be opened."""
    for file in neighbours(path) or [path]:
        try:
            yield from _read(file, reading, on_bytes)
        except OSError as e:
            if file == path:
                raise
            reading.problem(f"{file}: {e.strerror}")


def _read(file: Path, reading: Reading, on_bytes: Callable[[int], None] | None) -> Iterator[Line]:
    with file.open("rb", buffering=_BUFFER_BYTES) as lines:
        reading.files.append(file)
        number = size = 0
        for line in iter(partial(lines.readline, MAX_LINE_BYTES), b""):
            number += 1
            size += len(line)
            if size >= _BUFFER_BYTES:
                if on_bytes is not None:
                    on_bytes(size)
                size = 0
            if line == b"\n":
                continue
            reading.lines += 1
            try:
                found = _decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
                _skip(line, f"{file}:{number}", e, reading)
                continue
            if found.v > VERSION:
                reading.newer += 1
                reading.problem(f"{file}:{number}: written by a newer impala (version {found.v} of the record)")
                continue
            yield found
        if on_bytes is not None:
            on_bytes(size)


def _skip(line: bytes, where: str, error: Exception, reading: Reading) -> None:
    try:
        version = _decode_version(line).v
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        version = VERSION
    if version > VERSION:
        reading.newer += 1
        reading.problem(f"{where}: written by a newer impala (version {version} of the record)")
    else:
        reading.corrupt += 1
        reading.problem(f"{where}: {' '.join(str(error).split())[:160]}")

"""Reads log files: plain or zstandard, one file or a directory of them, with line numbers in every error."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import msgspec
import zstandard

S = TypeVar("S")


class WorkloadError(ValueError):
    """A log that cannot be read, in one line: what, where, and what to do."""


BAD_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises for a text that is not the record asked for, or is nested too deep."""

OnError = Callable[[WorkloadError], None]


class Line(NamedTuple):
    """One non-empty line and where it stands."""

    data: bytes
    where: str
    """`FILE:LINE`."""


def fail(error: WorkloadError) -> None:
    """The strict way to treat a bad line: stop."""
    raise error


def files(path: Path, on_error: OnError = fail) -> list[Path]:
    """The file itself, or what a directory holds, by name; a file that cannot be opened goes to `on_error`."""
    try:
        found = (
            sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")) if path.is_dir() else [path]
        )
    except OSError as e:
        raise _unreadable(path, e) from e
    if not found:
        raise WorkloadError(f"{path}: the directory holds no file; give a log or a directory of logs")
    usable: list[Path] = []
    for file in found:
        if file.exists() and not file.is_file():
            raise WorkloadError(f"{file}: no regular file, and a log is read twice; save it to a file first")
        try:
            with file.open("rb"):
                usable.append(file)
        except OSError as e:
            on_error(_unreadable(file, e))
    return usable


def lines(file: Path) -> Iterator[Line]:
    """Non-empty lines of a file, one at a time."""
    number = 0
    try:
        with _open(file) as stream:
            for number, data in enumerate(stream, 1):
                data = data.strip()
                if data:
                    yield Line(data, f"{file}:{number}")
    except zstandard.ZstdError as e:
        raise WorkloadError(f"{file}:{number + 1}: damaged zstandard data ({e}); fetch the file again") from e
    except OSError as e:
        raise WorkloadError(f"{file}:{number + 1}: cannot read on ({e.strerror}); check the disk") from e


def whole(file: Path) -> bytes:
    """All of a file."""
    return b"\n".join(line.data for line in lines(file))


def records(file: Path, decoder: msgspec.json.Decoder[S], on_error: OnError) -> Iterator[tuple[S, str]]:
    """Decoded lines and where they stand; bad ones go to `on_error`."""
    for line in lines(file):
        try:
            yield decoder.decode(line.data), line.where
        except BAD_JSON as e:
            on_error(bad_line(line.where, e))


def bad_line(where: str, error: Exception) -> WorkloadError:
    """The one line for a record that is not what its format asks for."""
    what = str(error) if isinstance(error, msgspec.ValidationError) else f"not valid JSON ({error})"
    return WorkloadError(f"{where}: {what}; mend or remove that line, or name another --format")


def _unreadable(path: Path, error: OSError) -> WorkloadError:
    return WorkloadError(f"{path}: cannot read it ({error.strerror}); give a log or a directory of logs")


def _open(file: Path) -> IO[bytes]:
    raw = file.open("rb")
    if raw.read(4) != zstandard.FRAME_HEADER and file.suffix != ".zst":
        raw.seek(0)
        return raw
    raw.seek(0)
    # Long-range frames (--long=27) ask for a 128 MiB window.
    reader: Any = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(raw, read_across_frames=True)
    return io.BufferedReader(reader, 1 << 20)

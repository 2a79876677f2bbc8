"""A file that a command is asked to write: refused before the work where it cannot be, written whole or not at all."""

import os
from collections.abc import Iterable
from pathlib import Path

from impala_vllm.config import ConfigError


def check(out: Path, inputs: Iterable[Path], what: str) -> None:
    """Raise ConfigError where `out` cannot be written, or is one of `inputs`: `what`, files or directories of them."""
    if out.exists() and not out.is_file() and not out.is_dir():
        raise ConfigError(f"{out}: no regular file, so it cannot be replaced; give a file")
    folder = out.resolve().parent
    if out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{out}: cannot write there; give a file in a writable folder")
    if out.exists() and any(out.samefile(part) for given in inputs for part in _files(given)):
        raise ConfigError(f"{out}: that is {what} itself; give another file")


def write(out: Path, text: str) -> None:
    """All of it or nothing; what a link points to is replaced, not the link. Raises ConfigError."""
    out = out.resolve()
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(out)
    except BaseException as e:
        partial.unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise ConfigError(f"{out}: cannot write it ({e.strerror}); make room, or give another folder") from e
        raise


def _files(given: Path) -> list[Path]:
    """Those of a directory, or the file itself, as far as they are there."""
    try:
        return [part for part in (given.iterdir() if given.is_dir() else [given]) if part.is_file()]
    except OSError:  # whoever reads it says so
        return []

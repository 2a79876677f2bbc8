"""A file that a command is asked to write: refused before the work where it cannot be, written whole or not at all."""

import os
from collections.abc import Iterable
from pathlib import Path

from impala_vllm.config import ConfigError


def check(out: Path, inputs: Iterable[Path], what: str) -> None:
    """Raise ConfigError where `out` cannot be written, or is one of `inputs`, which are `what`."""
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(f"{out}: cannot write there; give a file in a writable folder")
    if any(out.exists() and part.exists() and out.samefile(part) for part in inputs):
        raise ConfigError(f"{out}: that is {what} itself; give another file")


def write(out: Path, text: str) -> None:
    """All of it or nothing. Raises ConfigError."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(out)
    except OSError as e:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{out}: cannot write it ({e.strerror}); make room, or give another folder") from e

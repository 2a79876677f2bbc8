"""The directory of a slab: this user's alone, since what lies there is derived from prompts."""

import os
import stat
from pathlib import Path

OURS = ("*.slab", "*.index")
OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_private(directory: Path) -> str | None:
    """Make the directory with mode 0700, or take everybody else's rights off one that holds nothing but slabs.

    Returns what was changed, in words. Raises OSError, and `NotPrivateError` where it must not or cannot be changed.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = stat.S_IMODE(directory.stat().st_mode)
    if not mode & OTHERS:
        return None
    reason = why_not_private(directory)
    if reason is not None:
        raise NotPrivateError(reason)
    directory.chmod(mode & ~OTHERS)
    return f"{directory} was open to other users (mode {mode:o}) and is this one's alone now"


def why_not_private(directory: Path) -> str | None:
    """Why `make_private` would refuse this existing directory, and what to do; None: it would not. Changes nothing."""
    found = directory.stat()
    if not found.st_mode & OTHERS:
        return None
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid == os.geteuid() and _holds_only_slabs(directory):
        return None
    return (
        f"{directory} is open to other users (mode {mode:o}), and KV tells what prompts said; "
        f"name a directory in it that does not exist yet, or make it yours alone: chmod 700 {directory}"
    )


class NotPrivateError(Exception):
    """Other users could enter the directory; one line: what, where, what to do."""


def _holds_only_slabs(directory: Path) -> bool:
    try:
        entries = list(directory.iterdir())
    except PermissionError:
        return False
    return all(e.name == "lost+found" or any(e.match(pattern) for pattern in OURS) for e in entries)

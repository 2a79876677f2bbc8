"""How much host memory this machine, or the container around this process, has to spare."""

from pathlib import Path
from typing import NamedTuple

CGROUP_ROOT = Path("/sys/fs/cgroup")


class _Files(NamedTuple):
    """What a version of cgroups calls its figures."""

    limit: str
    usage: str
    cache: str
    """In `memory.stat`: file pages that nobody has used lately."""


_V2 = _Files("memory.max", "memory.current", "inactive_file")
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def of_machine() -> int:
    """Bytes that may still be taken of the machine's memory, by whomever."""
    import psutil

    available: int = psutil.virtual_memory().available
    return available


def of_container() -> int | None:
    """Bytes that the limits on this process leave; None: there are none."""
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:
        return None
    return below_limits(CGROUP_ROOT, own)


def below_limits(root: Path, own: str) -> int | None:
    """What is left under the memory limits of a process's cgroups, those around them included; None: there are none.

    `root` is where cgroups are mounted, `own` the process's /proc/self/cgroup. Like the kernel before it kills, this
    counts file pages that can be given back as free. In a container the path in `own` may be the host's: whatever does
    not exist below `root` is passed over, and what limits the container is at `root` itself.
    """
    left: list[int] = []
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            bases, files = (root, root / "unified"), _V2
        elif "memory" in controllers.split(","):
            bases, files = (root / "memory",), _V1
        else:
            continue
        for base in bases:
            folder = base.joinpath(*(part for part in Path(path).parts if part not in ("/", "..")))
            around = [folder, *folder.parents]
            found = (_left_in(level, files) for level in around[: around.index(base) + 1])
            left += [num_bytes for num_bytes in found if num_bytes is not None]
    return min(left, default=None)


def _left_in(folder: Path, files: _Files) -> int | None:
    """None: this level has no limit."""
    try:
        limit = int((folder / files.limit).read_text(encoding="utf-8"))
        used = int((folder / files.usage).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # "max" is no number
        return None
    return max(0, limit - max(0, used - _cache(folder, files)))


def _cache(folder: Path, files: _Files) -> int:
    try:
        lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(value) for name, _, value in (line.partition(" ") for line in lines) if name == files.cache), 0)

"""One measured figure as one line of JSON, and the append-only files they live in.

A record says everything needed to get the figure again. `question` starts with its kind (`identity/`,
`audit/`, `micro/`, `sim/`, `serving/`): figures of different kinds never share a table.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from impala_vllm.replay.measures import quantile

RESULTS = Path(__file__).parent / "results"
KINDS = ("identity", "audit", "micro", "sim", "serving")


class RecordError(ValueError):
    """A record or a file of them that cannot be used, in one line."""


@dataclass(frozen=True, slots=True)
class Record:
    """A figure. p20, p50 and p80 are over `n` repetitions (or over turns where the metric says so)."""

    question: str
    variant: str
    params: dict[str, Any]
    metric: str
    unit: str
    better: str
    """"lower", "higher", or "-" for context."""
    n: int
    p20: float
    p50: float
    p80: float
    source: str
    """"measured" or "simulated"."""
    seed: int | None
    commit: str
    versions: dict[str, str]
    machine: str
    command: str

    @property
    def kind(self) -> str:
        return self.question.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Origin:
    """What the records of one run have in common."""

    commit: str
    versions: dict[str, str]
    machine: str
    command: str

    def record(
        self,
        question: str,
        variant: str,
        params: dict[str, Any],
        metric: str,
        unit: str,
        better: str,
        values: Sequence[float],
        *,
        source: str = "measured",
        seed: int | None = None,
    ) -> Record:
        """The record of a figure that has come out as `values`, one a repetition."""
        p20, p50, p80 = (quantile(values, share) for share in (0.2, 0.5, 0.8))
        return Record(
            question, variant, params, metric, unit, better, len(values), p20, p50, p80, source, seed,
            self.commit, self.versions, self.machine, self.command,
        )  # fmt: skip


def origin(command: str | None = None) -> Origin:
    """Of this process; `command` defaults to how it was started."""
    return Origin(_commit(), _versions(), _machine(), command or _command())


def append(records: Sequence[Record], directory: Path = RESULTS) -> Path:
    """Add to today's file for this machine and commit; returns it. Files sort by when they were begun."""
    directory.mkdir(parents=True, exist_ok=True)
    first, now = records[0], datetime.now(UTC)
    slug = re.sub(r"[^a-z0-9]+", "-", first.machine.lower()).strip("-")[:40]
    name = f"{slug}-{first.commit[:12]}.jsonl"
    begun = sorted(directory.glob(f"{now:%Y%m%d}T*-{name}"))
    path = begun[0] if begun else directory / f"{now:%Y%m%dT%H%M}-{name}"
    with path.open("a", encoding="utf-8") as out:
        for record in records:
            out.write(json.dumps(asdict(record), sort_keys=False) + "\n")
    return path


def read(paths: Iterable[Path]) -> list[Record]:
    """Records of the files, in order. Raises RecordError with file and line."""
    names = {f.name for f in fields(Record)}
    records: list[Record] = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                data = json.loads(line)
                if set(data) != names:
                    odd = sorted(set(data) ^ names)
                    raise RecordError(f"{path}:{number}: fields {', '.join(odd)} are missing or unknown")
                record = Record(**data)
            except (ValueError, TypeError) as e:
                raise e if isinstance(e, RecordError) else RecordError(f"{path}:{number}: not a record ({e})") from e
            if record.kind not in KINDS:
                raise RecordError(f"{path}:{number}: question {record.question!r} must start with a kind: {KINDS}")
            records.append(record)
    return records


def _commit() -> str:
    """The commit, `-dirty` with changes in tracked files; results of earlier runs are no change."""
    changed = ("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results",
               ":(top,exclude)RESULTS.md")  # fmt: skip
    try:
        return _git("rev-parse", "--short=12", "HEAD") + ("-dirty" if _git(*changed) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    ).stdout.strip()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("vllm", "torch", "impala-vllm"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> str:
    """Processor, cores and memory; no host name."""
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text(encoding="utf-8")
        name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
        widest = next((flag for flag in ("amx_bf16", "avx512f", "avx2") if re.search(rf"\b{flag}\b", text)), "")
        model = " ".join(filter(None, (name.group(1).strip() if name else model, widest)))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory_gib:.0f} GiB"


def _command() -> str:
    """As typed, but for where files lie on this machine."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec is not None and spec.name else None
    start = [Path(sys.argv[0]).name] if name is None else ["python", "-m", name]
    return shlex.join([*start, *(_without_folder(a) for a in sys.argv[1:])])


def _without_folder(argument: str) -> str:
    flag, equals, value = argument.rpartition("=")
    return f"{flag}{equals}{Path(value).name}" if value.startswith("/") else argument

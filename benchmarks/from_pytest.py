"""Micro benchmarks into records: `python -m benchmarks.from_pytest BENCH.json`.

The file comes from `pytest benchmarks/micro --benchmark-enable -m '' --benchmark-json BENCH.json
--benchmark-save-data`; a test's module is the question, its name and parameters the variant.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.record import Origin, Record, RecordError

COMMAND = "pytest benchmarks/micro --benchmark-enable -m '' --benchmark-json BENCH.json --benchmark-save-data"


def records(path: Path, origin: Origin) -> list[Record]:
    """One record a benchmark. Raises RecordError with one line."""
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RecordError(f"{path}: not a pytest-benchmark file ({e}); write one with --benchmark-json") from e
    if not found or any("data" not in b["stats"] for b in found):
        raise RecordError(f"{path}: no single timings in it; add --benchmark-save-data")
    return [_record(b, origin) for b in found]


def _record(benchmark: dict[str, Any], origin: Origin) -> Record:
    module = benchmark["fullname"].partition("::")[0].rpartition("/")[2].removesuffix(".py")
    microseconds = [s * 1e6 for s in benchmark["stats"]["data"]]
    question = f"micro/{module.removeprefix('test_').removeprefix('bench_')}"
    params = {**(benchmark.get("extra_info") or {})}
    return origin.record(question, benchmark["name"].removeprefix("test_"), params, "time", "us", "lower", microseconds)


def main(arguments: list[str]) -> int:
    """Append the file's records; 2 and one line if it cannot be used."""
    if len(arguments) != 1:
        print("error: give one file written with --benchmark-json", file=sys.stderr)
        return 2
    try:
        made = records(Path(arguments[0]), record.origin(COMMAND))
    except RecordError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(f"{len(made)} records in {record.append(made)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

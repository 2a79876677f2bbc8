"""pytest-benchmark's file into records."""

import json
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.from_pytest import records
from benchmarks.record import RecordError


def bench(tmp_path: Path, stats: dict[str, object]) -> Path:
    entry = {"name": "test_insert[10]", "fullname": "benchmarks/micro/test_index.py::test_insert[10]", "stats": stats}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"benchmarks": [entry]}))
    return path


def test_a_benchmark_becomes_a_record(tmp_path: Path) -> None:
    (made,) = records(bench(tmp_path, {"data": [1e-6, 2e-6, 3e-6]}), record.origin("pytest"))
    assert (made.question, made.variant, made.metric, made.unit) == ("micro/index", "insert[10]", "time", "us")
    assert (made.n, made.p50) == (3, pytest.approx(2.0))
    assert record.read([record.append([made], tmp_path / "results")]) == [made]


def test_a_file_without_single_timings_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="add --benchmark-save-data"):
        records(bench(tmp_path, {"median": 1.0}), record.origin("pytest"))


def test_a_file_of_another_kind_says_so(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text("[]")
    with pytest.raises(RecordError, match="not a pytest-benchmark file"):
        records(path, record.origin("pytest"))

"""Records survive the file, and RESULTS.md is made of them."""

from dataclasses import replace
from datetime import datetime, tzinfo
from pathlib import Path

import pytest

from benchmarks import record, report
from benchmarks.record import Record, RecordError

ONE = Record(
    question="serving/baseline", variant="stock", params={"load": "batch", "to": "x"}, metric="tasks_per_hour",
    unit="/h", better="higher", n=5, p20=290.5, p50=300.0, p80=1310.25, source="measured", seed=0, commit="abc123",
    versions={"python": "3.11", "vllm": "0.32.0"}, machine="Some CPU, 2 cores",
    command="python -m benchmarks.serving baseline",
)  # fmt: skip


def test_records_are_appended_and_read_back(tmp_path: Path) -> None:
    path = record.append([ONE], tmp_path)
    assert record.append([replace(ONE, variant="other")], tmp_path) == path
    assert record.read([path]) == [ONE, replace(ONE, variant="other")]
    assert path.name.endswith("-some-cpu-2-cores-abc123.jsonl")


def test_files_of_one_day_sort_by_when_they_were_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        hour_now = 9

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime(2026, 1, 2, cls.hour_now, 30, tzinfo=tz)

    monkeypatch.setattr(record, "datetime", Clock)
    (tmp_path / "20260102-some-cpu-2-cores-0ld.jsonl").touch()
    first = record.append([replace(ONE, commit="fff")], tmp_path)
    Clock.hour_now = 10
    second = record.append([replace(ONE, commit="aaa")], tmp_path)
    assert record.append([replace(ONE, commit="fff")], tmp_path) == first
    assert sorted(tmp_path.iterdir())[1:] == [first, second]


@pytest.mark.parametrize(
    ("line", "says"),
    [("{", "not a record"), ('{"question": "serving/x"}', "missing or unknown"), ("[]", "missing or unknown")],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = record.append([ONE], tmp_path)
    with path.open("a") as out:
        out.write(line + "\n")
    with pytest.raises(RecordError, match=f"{path.name}:2: .*{says}"):
        record.read([path])


def test_a_question_without_a_kind_is_refused(tmp_path: Path) -> None:
    path = record.append([replace(ONE, question="baseline")], tmp_path)
    with pytest.raises(RecordError, match="must start with a kind"):
        record.read([path])


def test_kinds_never_share_a_table_and_each_table_says_how() -> None:
    page = report.render([ONE, replace(ONE, question="micro/index", metric="insert", unit="us")])
    serving, micro = page.split("## Micro")
    assert "tasks_per_hour" in serving
    assert "insert" not in serving
    assert "insert" in micro
    for chapter in (serving, micro):
        assert "    python -m benchmarks.serving baseline" in chapter
        assert "Some CPU, 2 cores. Commit `abc123`" in chapter
    assert "| stock | tasks_per_hour | 300 /h | 290.5-1,310 | 5 | higher |" in serving


def test_only_the_latest_run_of_a_question_is_shown() -> None:
    again = replace(ONE, p50=400.0)
    page = report.render([ONE, replace(ONE, metric="jct_mean_s"), again])
    assert "| 400 /h |" in page
    assert "| 300 /h |" not in page
    assert "jct_mean_s" not in page


def test_another_disk_is_another_load() -> None:
    other = replace(ONE, p50=400.0, command="python -m benchmarks.io", params={**ONE.params, "disk": "in memory"})
    page = report.render([ONE, other])
    assert "| 300 /h |" in page
    assert "| 400 /h |" in page


def test_this_process_says_where_it_ran() -> None:
    origin = record.origin("python -m x")
    assert origin.command == "python -m x"
    assert "cores" in origin.machine
    assert "python" in origin.versions


def test_a_command_names_no_place_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "baseline", "--traces", "/somewhere/private/log.jsonl", "--pairs", "2"])
    assert record.origin().command.endswith("baseline --traces log.jsonl --pairs 2")
    monkeypatch.setattr("sys.argv", ["bench", "baseline", "--traces=/somewhere/private/log.jsonl", "--poisson=2"])
    assert record.origin().command.endswith("baseline --traces=log.jsonl --poisson=2")

"""What steps write is what the project's records are."""

import io
from pathlib import Path

from benchmarks import record
from benchmarks.gpu import summary
from benchmarks.gpu.out import Out, origin


def _out(directory: Path, step: str = "step") -> Out:
    return Out(step, directory, io.StringIO(), origin("A GPU"))


def test_a_figure_is_a_record_that_can_be_read_back(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("IMPALA_GPU_COMMIT", "0123456789ab")
    median = _out(tmp_path).figure(
        "micro/gpu-x", "impala", "H2D", "GB/s", [1.0, 3.0, 2.0], better="higher", size="1 MiB"
    )
    (read,) = record.read(tmp_path.glob("*.jsonl"))
    assert median == read.p50 == 2.0
    assert (read.n, read.source, read.commit) == (3, "measured", "0123456789ab")
    assert read.machine.startswith("A GPU, ")
    assert read.params == {"size": "1 MiB", "step": "step"}


def test_figures_of_a_rehearsal_say_so(tmp_path: Path):
    out = _out(tmp_path)
    out.is_rehearsal = True
    out.figure("micro/gpu-x", "impala", "H2D", "GB/s", [1.0], better="higher")
    assert record.read(tmp_path.glob("*.jsonl"))[0].source == "rehearsal"


def test_facts_reach_later_steps(tmp_path: Path):
    first, second = _out(tmp_path, "first"), _out(tmp_path, "second")
    assert second.facts() == {}
    first.note(H2D=5.0)
    second.note(mode=["v2", True, None])
    assert first.facts() == {"H2D": 5.0, "mode": ["v2", True, None]}


def test_the_summary_compares_arms_with_stock_and_ignores_older_figures(tmp_path: Path):
    out = _out(tmp_path)
    for arm, value in (("stock", 1.0), ("stock", 100.0), ("impala", 150.0)):
        out.figure("serving/gpu-x", arm, "tasks_per_hour", "/h", [value], better="higher")
    for pages, share in (("2 KiB", 0.5), ("64 KiB", 0.95)):
        out.figure("micro/gpu-swap", "impala", f"share of link, {pages}", "", [share], better="higher")
    said = summary.lines(tmp_path)
    assert "summary: serving/gpu-x, tasks_per_hour: impala / stock = 1.500" in said
    assert any("0.950" in line for line in said)


def test_the_summary_of_broken_records_is_one_line(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text("{")
    assert len(summary.lines(tmp_path)) == 1

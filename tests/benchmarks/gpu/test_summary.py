"""What a run says of its records in the end."""

import io
from pathlib import Path

from benchmarks.gpu import summary
from benchmarks.gpu.out import Out, origin


def test_arms_are_set_against_stock_and_bars_shown_as_a_range(tmp_path: Path):
    out = Out("a step", tmp_path, io.StringIO(), origin("a machine"))
    for arm, rate in (("stock", 100.0), ("impala", 150.0)):
        out.figure("serving/gpu-sessions-1b", arm, "tasks_per_hour", "/h", [rate], better="higher")
        out.figure("serving/gpu-sessions-1b", arm, "num_failed", "", [0.0], better="lower")
    out.figure("micro/gpu-swap", "courier", "share of link, H2D, 16 KiB x 4096", "", [0.93], better="higher")
    out.figure("micro/gpu-swap", "courier", "to vLLM's, H2D, 2 KiB x 4096", "", [1.2], better="higher")
    said = summary.lines(tmp_path)
    assert any("to vLLM's, H2D, 2 KiB x 4096, courier: 1.200" in line for line in said)
    assert "summary: serving/gpu-sessions-1b, tasks_per_hour: impala / stock = 1.500" in said
    assert any("share of link, H2D, 16 KiB x 4096, courier: 0.930 to 0.930" in line for line in said)
    assert not any("num_failed" in line for line in said)


def test_a_folder_with_nothing_in_it_has_nothing_to_say(tmp_path: Path):
    assert summary.lines(tmp_path) == []

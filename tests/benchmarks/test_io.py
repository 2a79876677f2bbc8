"""The block I/O benchmark at its smallest: every engine moves bytes, the records are fit to be kept."""

import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import record
from benchmarks.io import __main__ as bench
from benchmarks.io.load import Load, Rate, make_file, run_fio, run_threads, run_uring
from benchmarks.record import Origin
from impala_vllm.transfer.alignment import use_direct

ORIGIN = Origin("abc", {}, "a machine", "a command")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    make_file(path, 4 << 20)
    fd = os.open(path, os.O_RDWR)
    is_direct = use_direct(fd)
    os.close(fd)
    if not is_direct:
        pytest.skip("the file system has no direct I/O")
    return path


@pytest.mark.parametrize("is_write", [False, True])
@pytest.mark.parametrize("engine", ["threads", "io_uring", "registered", "fio", "fio registered"])
def test_each_engine_moves_bytes_at_a_price(path: Path, engine: str, is_write: bool):
    load = Load(is_write, 16 << 10, 4, 0.1)
    if engine.startswith("fio") and not shutil.which("fio"):
        pytest.skip("no fio")
    run = {
        "threads": lambda: run_threads(path, load, 2),
        "io_uring": lambda: run_uring(path, load, False),
        "registered": lambda: run_uring(path, load, True),
        "fio": lambda: run_fio(path, load),
        "fio registered": lambda: run_fio(path, load, is_registered=True),
    }[engine]
    try:
        rate = run()
    except OSError as error:
        pytest.skip(str(error))
    assert rate.bytes_per_s > 0
    assert rate.cpu_s_per_gb > 0


def test_ratios_are_taken_within_a_repetition(tmp_path: Path):
    rates = {
        "io_uring": [Rate(2e8, 0.1), Rate(4e8, 0.1), Rate(8e8, 0.1)],
        "io_uring, registered": [Rate(3e8, 0.1), Rate(6e8, 0.1), Rate(12e8, 0.1)],
        "8 threads": [Rate(1e8, 0.3), Rate(2e8, 0.3), Rate(4e8, 0.3)],
        "fio": [Rate(2e8, 0.1), Rate(8e8, 0.1), Rate(8e8, 0.1)],
    }
    made = bench.records(Load(False, 64 << 10, 16, 2.0), {"file MiB": 1024}, rates, ORIGIN)
    found = {(r.variant, r.metric): (r.p20, r.p50, r.p80) for r in made}
    assert found["read 64 KiB: io_uring over 8 threads", "bandwidth"] == (2.0, 2.0, 2.0)
    assert found["read 64 KiB: io_uring, registered over 8 threads", "bandwidth"] == (3.0, 3.0, 3.0)
    assert found["read 64 KiB: io_uring over fio", "bandwidth"][1] == 1.0
    assert not any("over io_uring" in variant for variant, _ in found)
    assert found["read 64 KiB: io_uring", "bandwidth"][1] == 400.0
    assert found["read 64 KiB: 8 threads", "cpu_s_per_gb"][1] == 0.3
    assert record.read([record.append(made, tmp_path)]) == made


@pytest.mark.parametrize("sizes", ["x", "", "3", "64,,4", "-4"])
def test_wrong_sizes_are_one_line_and_exit_2(tmp_path: Path, sizes: str):
    done = CliRunner().invoke(bench.main, [str(tmp_path), f"--sizes={sizes}", "--no-record"])
    assert done.exit_code == 2
    assert "give multiples of 4" in done.output
    assert list(tmp_path.iterdir()) == []

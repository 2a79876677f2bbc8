"""Runs the kernels' tests under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


# Half a minute of CPU; on a busy machine that can take long.
@pytest.mark.timeout(900)
def test_kernels_do_what_naive_says() -> None:
    tests = [HERE / name for name in ("test_swap.py", "test_pack.py", "test_fp8.py")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, tests)],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]

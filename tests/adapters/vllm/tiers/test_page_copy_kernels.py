"""The worker's tests once more, its copies by the kernels in Triton's interpreter; that is chosen at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("triton")

HERE = Path(__file__).parent


@pytest.mark.timeout(900)
def test_the_worker_does_the_same_by_kernels() -> None:
    tests = [HERE / f"test_page_copy{part}.py" for part in ("", "_proof", "_layouts")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, tests)],
        cwd=HERE.parents[3],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]

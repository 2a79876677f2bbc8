"""The compiler takes the kernels for a GPU; none is needed. The interpreter takes much that it does not."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from impala_vllm.ops import fp8, pack, swap

def compile(kernel, pointers, **constants):
    kinds = {name: "constexpr" if name in constants else "*i64" if i < pointers else "i64" if name == "run_address"
             else "i32" for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(kernel, kinds, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    print(kernel.__name__, "b64" in built.asm["ptx"], "atom" in built.asm["ptx"])

compile(swap._copy_ranges, 3, CHUNK_WORDS=1024)
compile(swap._swap_pages, 9, CHUNK_WORDS=1)
compile(swap._swap_pages, 9, CHUNK_WORDS=1024)
for to_run in (True, False):
    compile(pack._pack, 7, CHUNK_WORDS=1024, TO_RUN=to_run, CHECKSUM=True)
    compile(pack._pack, 7, CHUNK_WORDS=256, TO_RUN=to_run, CHECKSUM=False)
for kernel in (fp8._demote, fp8._promote):
    compile(kernel, 10, GROUP=1024)
"""


def test_kernels_compile_for_hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == [
        *("_copy_ranges", "True", "False"),
        *("_swap_pages", "True", "False") * 2,
        *("_pack", "True", "True", "_pack", "True", "False") * 2,
        *("_demote", "True", "False", "_promote", "True", "False"),
    ]

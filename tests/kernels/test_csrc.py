"""The native block I/O code on its own: its C++ tests under sanitizers, and what a bare machine builds."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "kernels" / "csrc"
NO_IO_URING = 77
SILENT_PIPE = """
#include <signal.h>
#include <sys/time.h>
#include <unistd.h>

#include "block_io_probe.hpp"

extern "C" ssize_t __wrap_write(int, const void*, size_t length) { return static_cast<ssize_t>(length); }

int main(int, char** argv) {
    struct sigaction action {};
    action.sa_handler = [](int) {};
    sigaction(SIGALRM, &action, nullptr);
    const itimerval often{{0, 200000}, {0, 200000}};
    setitimer(ITIMER_REAL, &often, nullptr);
    return impala::probe_block_io(argv[1]).io_uring ? 1 : 0;
}
"""
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(not (COMPILER and shutil.which("cmake")), reason="needs cmake and a C++ compiler")


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_native_tests_pass_under_sanitizers(tmp_path: Path, sanitizers: str):
    if not has(sanitizers, tmp_path):
        pytest.skip(f"this compiler has no -fsanitize={sanitizers} that runs here")
    must_pass(run_tests(build(tmp_path, f"-DIMPALA_SANITIZE={sanitizers}"), tmp_path))


def test_without_headers_it_builds_and_says_that_there_is_no_io_uring(tmp_path: Path):
    done = run_tests(build(tmp_path, "-DIMPALA_HAS_IO_URING=OFF", "-DIMPALA_HAS_XXHASH=OFF"), tmp_path)
    assert done.returncode == NO_IO_URING
    assert "built without <linux/io_uring.h>" in done.stdout
    with pytest.raises(pytest.skip.Exception, match=r"built without <linux/io_uring.h>"):
        must_pass(done)  # a skip that says why, not a pass


def test_an_io_uring_that_never_answers_is_given_up_though_signals_come(tmp_path: Path):
    if not Path("/usr/include/linux/io_uring.h").exists():
        pytest.skip("needs <linux/io_uring.h>")
    source, program = tmp_path / "silent.cpp", tmp_path / "silent"
    source.write_text(SILENT_PIPE)
    sources = [source, *(SOURCE / f"{name}.cpp" for name in ("block_io_probe", "uring_file", "ring", "checksum"))]
    line = [str(COMPILER), "-std=c++17", f"-I{SOURCE}", *sources, "-Wl,--wrap=write", "-pthread", "-o", program]
    built = subprocess.run(line, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert subprocess.run([program, tmp_path], timeout=60).returncode == 0


@pytest.mark.parametrize(("code", "printed"), [(1, "no io_uring"), (0, ""), (-6, "ok\n")])
def test_nothing_else_is_a_skip_or_a_pass(code: int, printed: str):
    with pytest.raises(AssertionError):
        must_pass(subprocess.CompletedProcess([], code, printed, ""))


def must_pass(done: "subprocess.CompletedProcess[str]") -> None:
    """Fail where the native tests did; skip, with their reason, where the kernel offers them no io_uring."""
    if done.returncode == NO_IO_URING:
        pytest.skip(done.stdout.strip() or "no io_uring here, and no reason given")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr


def has(sanitizers: str, directory: Path) -> bool:
    """Whether the compiler has them, their runtime is installed, and it can run in this process's surroundings."""
    source = directory / "empty.cpp"
    source.write_text("int main() {}")
    program = directory / "empty"
    built = subprocess.run([str(COMPILER), f"-fsanitize={sanitizers}", source, "-o", program], capture_output=True)
    return built.returncode == 0 and subprocess.run([program], capture_output=True).returncode == 0


def build(directory: Path, *options: str) -> Path:
    """The test program."""
    binaries = directory / "build"
    flags = ["-DIMPALA_NATIVE_TESTS=ON", "-DCMAKE_CXX_FLAGS=-O1 -g -Werror", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
    for command in (["-S", SOURCE, "-B", binaries, *flags, *options], ["--build", binaries, "--parallel"]):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return binaries / "block_io_tests"


def run_tests(program: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, directory], capture_output=True, text=True)

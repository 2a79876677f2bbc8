"""Archives that travel, and the environment that steps run in."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from benchmarks.gpu import bundle


def test_archives_are_unpacked_and_a_damaged_one_is_named_and_left_out(tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (tmp_path / "a.py").write_text("a = 1\n")
    with tarfile.open(source / "vllm.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "a.py", "a.py")
    with zipfile.ZipFile(source / "b-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("b.py", "b = 2\n")
    (source / "c.tar.xz").write_bytes((source / "vllm.tar.xz").read_bytes()[:60])
    said: list[str] = []
    bundle.unpack(source, target, said.append)
    assert sorted(p.name for p in target.glob("?.py")) == ["a.py", "b.py"]
    assert any("c.tar.xz cannot be unpacked" in line for line in said)


def test_without_archives_it_goes_on_with_what_is_there(tmp_path: Path):
    said: list[str] = []
    bundle.unpack(tmp_path / "none", tmp_path, said.append)
    assert len(said) == 1


def test_what_is_neither_in_the_bundle_nor_installed_is_missing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path / "installed")])
    for place in ("installed/torch", "installed/yaml", "site/vllm"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "__init__.py").write_text("")
    assert bundle.missing(tmp_path / "site") == ["msgspec", "xxhash", "zstandard"]
    assert bundle.missing(tmp_path / "other")[0] == "vllm"


def test_the_bundle_comes_before_the_tree_and_what_was_there_last(tmp_path: Path):
    base = {"PYTHONPATH": "/before", "HOME": "/root"}
    env = bundle.environment(base, tmp_path / "site", tmp_path, rehearsal=False, commit=None, command="x")
    assert env["PYTHONPATH"].split(os.pathsep) == [str(tmp_path / "site"), str(bundle.ROOT), "/before"]
    assert env["HOME"] == "/root"
    assert "TRITON_INTERPRET" not in env


def test_ops_are_reached_in_a_tree_without_a_link_to_them(tmp_path: Path):
    package = tmp_path / "impala_vllm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "kernels").symlink_to(bundle.ROOT / "kernels")
    program = (
        "import benchmarks.gpu.bundle as b, pathlib, sys\n"
        "b.ROOT = pathlib.Path(sys.argv[1])\n"
        "b.reach_ops()\n"
        "from impala_vllm.ops import naive\n"
        "print(naive.__file__)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(bundle.ROOT)])}
    found = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path += {sys.path[1:]!r}\n{program}", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
        timeout=120,
    )
    assert found.stdout.strip() == str(tmp_path / "kernels/ops/naive.py"), found.stderr[-2000:]

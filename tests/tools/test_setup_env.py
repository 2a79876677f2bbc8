"""The parts of `make setup` that touch files."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from tools import setup_env


def test_what_an_interrupted_pip_left_is_removed_and_the_rest_stays(tmp_path: Path):
    whole, half, moved = tmp_path / "a-1.dist-info", tmp_path / "b-1.dist-info", tmp_path / "~orch"
    for folder in (whole, half, moved):
        folder.mkdir()
    (whole / "RECORD").write_text("")
    (half / "METADATA").write_text("Name: b")
    assert sorted(setup_env.remove_half_installed(tmp_path)) == ["b-1.dist-info", "~orch"]
    assert [p.name for p in tmp_path.iterdir()] == ["a-1.dist-info"]


def test_pip_installs_the_name_wheel_and_nothing_importable_comes_with_it(tmp_path: Path):
    wheel = setup_env.write_name_wheel(tmp_path, "0.32.0+cpu")
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*command, "--no-index", "--no-deps", "--target", str(target), str(wheel)], check=True)
    assert [p.name for p in target.iterdir()] == ["vllm-0.32.0+cpu.dist-info"]
    (found,) = metadata.distributions(name="vllm", path=[str(target)])
    assert found.version == "0.32.0+cpu"

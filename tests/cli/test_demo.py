"""What `impala demo` refuses before it starts anything."""

import importlib.util
from pathlib import Path

import pytest
from click.testing import CliRunner

from impala_vllm.cli.demo import demo


def test_without_vllm_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    ran = CliRunner().invoke(demo, ["--out", str(tmp_path / "out")])
    assert ran.exit_code == 2
    assert "vLLM is not installed; `pip install" in ran.output
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    (tmp_path / "file").write_text("")
    ran = CliRunner().invoke(demo, ["--out", str(tmp_path / "file" / "out")])
    assert ran.exit_code == 2
    assert "cannot write there (Not a directory); give --out another directory" in ran.output

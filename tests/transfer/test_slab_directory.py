"""A slab's directory is its user's alone, and nobody else's directory is changed for that."""

import os
import stat
from pathlib import Path

import pytest

from impala_vllm.transfer.slab_directory import NotPrivateError, make_private, why_not_private


def mode(directory: Path) -> int:
    return stat.S_IMODE(directory.stat().st_mode)


def opened(directory: Path, to: int = 0o755) -> Path:
    directory.mkdir()
    directory.chmod(to)
    return directory


def test_a_new_directory_is_private(tmp_path: Path) -> None:
    assert make_private(tmp_path / "new" / "kv") is None
    assert mode(tmp_path / "new" / "kv") == 0o700


def test_a_private_one_stays_as_it_is_whatever_it_holds(tmp_path: Path) -> None:
    kv = opened(tmp_path / "kv", 0o500)
    assert why_not_private(kv) is None
    assert make_private(kv) is None
    assert mode(kv) == 0o500


@pytest.mark.parametrize("to", [0o755, 0o770, 0o1777, 0o701])
@pytest.mark.parametrize("held", [[], ["impala-dp0.slab", "impala-dp0.index", "lost+found"]])
def test_one_with_nothing_but_slabs_is_closed_and_that_is_said(tmp_path: Path, to: int, held: list[str]) -> None:
    kv = opened(tmp_path / "kv", to)
    for name in held:
        (kv / name).touch()
    assert why_not_private(kv) is None
    line = make_private(kv)
    assert line is not None
    assert f"{kv} was open to other users (mode {to:o})" in line
    assert mode(kv) & 0o777 == 0o700
    assert make_private(kv) is None


def test_one_that_holds_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    kv = opened(tmp_path / "kv", 0o755)
    (kv / "homework").touch()
    reason = why_not_private(kv)
    assert reason is not None
    assert f"chmod 700 {kv}" in reason
    with pytest.raises(NotPrivateError, match="mode 755"):
        make_private(kv)
    assert mode(kv) == 0o755


def test_one_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kv = opened(tmp_path / "kv", 0o777)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert why_not_private(kv) is not None

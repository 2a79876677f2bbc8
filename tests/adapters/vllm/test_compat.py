"""The window of vLLM versions and the seams inside it."""

import pytest

from impala_vllm.adapters.vllm import compat
from impala_vllm.config import ConfigError


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.32.1.dev3+g1234"])
def test_supported(version):
    assert compat.is_supported(version)


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0.0", "dev", ""])
def test_not_supported(version):
    assert not compat.is_supported(version)


def test_without_vllm_the_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda: None)
    with pytest.raises(ConfigError, match="pip install"):
        compat.require()


def test_every_seam_of_the_installed_vllm_is_as_expected():
    pytest.importorskip("vllm")
    assert [s for s in compat.check() if s.problem is not None] == []


def test_a_seam_says_what_changed():
    assert "cannot import" in (compat._problem("no.such.module:x", None) or "")
    assert compat._problem("json:dumpz", None) == "has no dumpz"
    assert "expected (a, b, ...)" in (compat._problem("json:dumps", ("a", "b")) or "")
    assert compat._problem("json:dumps", ("obj",)) is None

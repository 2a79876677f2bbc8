"""Block I/O capabilities, with the native module and without."""

import sys
from pathlib import Path

import pytest

from impala_vllm import native
from impala_vllm.native import BlockIo

needs_native = pytest.mark.skipif(not native.is_built(), reason="built without a C++ compiler")


@needs_native
def test_a_writable_directory_is_probed_and_left_empty(tmp_path: Path):
    found = native.probe_block_io(tmp_path)
    assert isinstance(found.io_uring, bool)
    assert isinstance(found.direct_io, bool)
    assert list(tmp_path.iterdir()) == []


@needs_native
def test_the_alignment_is_a_power_of_two_exactly_where_direct_io_works(tmp_path: Path):
    found = native.probe_block_io(tmp_path)
    assert (found.direct_alignment_bytes is not None) == found.direct_io
    if found.direct_alignment_bytes is not None:
        assert found.direct_alignment_bytes >= 512
        assert found.direct_alignment_bytes & (found.direct_alignment_bytes - 1) == 0


@needs_native
def test_a_missing_directory_raises_the_error_of_the_system_with_its_name():
    with pytest.raises(FileNotFoundError, match="/no/such/directory"):
        native.probe_block_io("/no/such/directory")


@needs_native
def test_probing_twice_leaks_no_descriptor(tmp_path: Path):
    native.probe_block_io(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        native.probe_block_io(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_without_the_native_module_every_answer_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "impala_vllm._native", None)
    monkeypatch.delattr("impala_vllm._native", raising=False)
    assert not native.is_built()
    assert native.probe_block_io(tmp_path) == BlockIo(None, None, None)

"""The entry point: nothing it does may take vLLM down."""

import multiprocessing
import subprocess
import sys

import pytest

from impala_vllm import plugin


def test_an_error_inside_is_one_warning(monkeypatch, caplog):
    install = pytest.importorskip("impala_vllm.adapters.vllm.install")

    def explode():
        raise AttributeError("EngineArgs has no add_cli_args")

    monkeypatch.setattr(install, "install", explode)
    plugin.register()
    (record,) = caplog.records
    assert "impala is not selectable" in record.message
    assert "impala doctor" in record.message


def test_an_engine_process_does_no_work(monkeypatch):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    for name in ("vllm.engine.arg_utils", "impala_vllm.adapters.vllm.install"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    plugin.register()
    assert "impala_vllm.adapters.vllm.install" not in sys.modules


def test_importing_the_package_imports_neither_torch_nor_vllm():
    script = "import sys, impala_vllm, impala_vllm.plugin; print({'torch', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_it_is_the_registered_entry_point():
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="vllm.general_plugins", name="impala")
    assert entry.load() is plugin.register

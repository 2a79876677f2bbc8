"""`impala doctor` on this machine, and on machines where something is missing."""

import json
import sys

import pytest
from click.testing import CliRunner

from impala_vllm import native
from impala_vllm.adapters.vllm import compat
from impala_vllm.cli.doctor import doctor


@pytest.fixture
def run(monkeypatch):
    monkeypatch.delenv("IMPALA_CONFIG", raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return lambda *flags: CliRunner().invoke(doctor, list(flags))


def test_json_is_whole_and_says_it_works_where_vllm_is_supported(run):
    pytest.importorskip("vllm")
    done = run("--json")
    found = json.loads(done.stdout)
    assert found["works"] is True, found["missing"]
    assert done.exit_code == 0
    assert all(seam["ok"] for seam in found["seams"])
    assert found["versions"]["torch"] is not None
    assert found["active"]["mode"].startswith("enforce")


def test_the_table_names_every_seam(run):
    pytest.importorskip("vllm")
    done = run()
    assert "EngineArgs.add_cli_args" in done.stdout
    assert "impala works here" in done.stdout


def test_without_vllm_it_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setattr(compat, "version", lambda: None)
    done = run()
    assert done.exit_code == 1
    assert "pip install 'impala-vllm[vllm]'" in done.stdout


def test_it_runs_where_neither_vllm_nor_torch_can_be_imported(run, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] in ("vllm", "torch")] + ["vllm", "torch"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert run("--json").exit_code == 1


@pytest.mark.parametrize(
    ("offered", "engine"),
    [
        (native.BlockIo(True, True, 512), "io_uring"),
        (native.BlockIo(True, True, 65536), "threads"),  # the slab is aligned to 4,096
        (native.BlockIo(False, True, 4096), "threads"),
        (native.BlockIo(True, False, None), "threads"),
        (native.BlockIo(), "threads"),
    ],
)
def test_it_names_what_would_do_the_disks_io(run, monkeypatch, offered: native.BlockIo, engine: str):
    monkeypatch.setattr(compat, "version", lambda: None)
    monkeypatch.setattr(native, "probe_block_io", lambda directory: offered)
    assert json.loads(run("--json").stdout)["block_io"]["engine"] == engine


def test_an_unsupported_vllm_is_named_with_the_window(run, monkeypatch):
    monkeypatch.setattr(compat, "version", lambda: "0.29.0")
    found = json.loads(run("--json").stdout)
    assert found["works"] is False
    assert found["seams"] == []
    assert "0.32.x" in found["missing"][0]["effect"]


def test_a_changed_seam_is_fatal(run, monkeypatch):
    monkeypatch.setattr(compat, "version", lambda: "0.32.0")
    monkeypatch.setattr(compat, "check", lambda: [compat.Seam("vllm.x:Y.z", "arrivals", "has no z")])
    done = run()
    assert done.exit_code == 1
    assert "has no z" in done.stdout


def test_filtered_plugins_are_fatal(run, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    done = run()
    assert done.exit_code == 1
    assert "add impala to VLLM_PLUGINS" in done.stdout


def test_what_is_accepted_but_not_active_is_said(run, tmp_path):
    file = tmp_path / "i.yaml"
    file.write_text("mode: enforce\nregistry: http://r\n")
    found = json.loads(run("--json", "--config", str(file)).stdout)
    assert "registry is not active" in found["active"]["ignored"]
    assert found["active"]["mode"].startswith("enforce: ")


def test_a_bad_file_is_one_line_and_2(run, tmp_path):
    file = tmp_path / "i.yaml"
    file.write_text("mod: observe\n")
    done = run("--config", str(file))
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean mode?" in done.stderr


def test_a_vllm_that_cannot_be_imported_is_a_lack_and_not_a_traceback(run, monkeypatch):
    pytest.importorskip("vllm")

    def fail(name):
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(compat.importlib, "import_module", fail)
    done = run("--json")
    assert done.exit_code == 1
    (lack,) = [lack for lack in json.loads(done.stdout)["missing"] if lack["what"] == "vLLM cannot be imported"]
    assert "libcudart" in lack["effect"]

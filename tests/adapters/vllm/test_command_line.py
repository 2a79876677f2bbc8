"""`--scheduler impala` in vLLM's own parser: what it becomes, and what each mistake is answered with."""

import dataclasses
import pickle
import socket
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from impala_vllm.adapters.vllm import choice, command_line, compat, tiering
from impala_vllm.config import ConfigError, Mode, load, restore
from impala_vllm.plugin import register


@pytest.fixture(scope="module")
def parser():
    register()
    register()  # vLLM may call it more than once
    return make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))


@pytest.fixture
def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture
def parse(parser, tmp_path, port, monkeypatch):
    monkeypatch.delenv(choice.CONFIG_VARIABLE, raising=False)

    def run(*flags):
        monkeypatch.setattr("sys.argv", ["vllm", "serve", *flags])
        return parser.parse_args([str(tmp_path), "--port", port, *flags])

    return run


@pytest.fixture
def refused(parse, capsys):
    """Parse, expect one line on stderr and exit code 2; the line."""

    def run(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            parse(*flags)
        assert leaving.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert len(lines) == 1
        assert lines[0].startswith("impala: ")
        return lines[0]

    return run


def test_not_selected_changes_no_argument(parse):
    args = parse()
    assert args.scheduler_cls is None
    assert args.middleware == []
    assert AsyncEngineArgs.from_cli_args(args).scheduler_cls is None


def test_selected_sets_scheduler_and_middleware(parse):
    args = parse("--scheduler", "impala", "--middleware", "some.one")
    assert str(args.scheduler_cls) == "impala_vllm.Scheduler"
    assert args.middleware == ["some.one", command_line.MIDDLEWARE]
    assert restore(args.scheduler_cls.impala_settings).config.mode is Mode.ENFORCE


def test_mode_off_leaves_stock_arguments(parse):
    args = parse("--scheduler", "impala", "--impala-mode", "off")
    assert args.scheduler_cls is None
    assert args.middleware == []


def test_the_settings_survive_every_way_vllm_copies_its_arguments(parse):
    args = parse("--scheduler", "impala", "--impala-mode", "enforce")
    args = pickle.loads(pickle.dumps(args))
    engine_args = AsyncEngineArgs.from_cli_args(args)
    for copied in (AsyncEngineArgs(**vars(engine_args)), dataclasses.replace(engine_args)):
        scheduler_cls: Any = copied.scheduler_cls
        assert restore(scheduler_cls.impala_settings).config.mode is Mode.ENFORCE
    assert args.middleware == [command_line.MIDDLEWARE]


def test_flags_win_over_yaml_and_say_so(parse, tmp_path):
    (tmp_path / "i.yaml").write_text("mode: enforce\nidentity:\n  max_traces: 9\n")
    args = parse("--scheduler=impala", "--impala-config", str(tmp_path / "i.yaml"), "--impala-mode=observe")
    settings = restore(args.scheduler_cls.impala_settings)
    assert settings.config.mode is Mode.OBSERVE
    assert settings.config.identity.max_traces == 9
    assert settings.origins == {"mode": "--impala-mode", "identity.max_traces": str(tmp_path / "i.yaml")}


def test_vllms_own_config_file_selects_it(parse, tmp_path):
    (tmp_path / "v.yaml").write_text('scheduler: impala\nimpala-mode: "off"\nimpala-host-gib: 2\n')
    args = parse("--config", str(tmp_path / "v.yaml"))
    assert args.impala_is_off
    (tmp_path / "v.yaml").write_text("scheduler: impala\nimpala-mode: observe\n")
    assert parse("--config", str(tmp_path / "v.yaml")).scheduler_cls == choice.SCHEDULER


def test_a_bare_yaml_off_is_refused_rather_than_dropped(refused, tmp_path):
    (tmp_path / "v.yaml").write_text("scheduler: impala\nimpala-mode: off\n")
    assert 'write "off" in quotes' in refused("--config", str(tmp_path / "v.yaml"))


def test_the_dotted_name_selects_it_too(parse):
    assert isinstance(parse("--scheduler-cls", "impala_vllm.Scheduler").scheduler_cls, choice.Choice)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--scheduler", "fifo"], "unknown scheduler 'fifo'"),
        (["--impala-mode", "observe"], "works with --scheduler impala only"),
        (["--impala-config", "x.yaml"], "works with --scheduler impala only"),
        (["--scheduler", "impala", "--impala-mode", "watch"], "choose one of off, observe, enforce"),
        (["--scheduler", "impala", "--impala-host-gib", "lots"], "--impala-host-gib: tiers.host_gib must be a number"),
        (["--scheduler", "impala", "--impala-host-gib", "-1"], "must be 0 or more"),
        (["--scheduler", "impala", "--impala-nvme-gib", "5"], "add --impala-nvme-path"),
        (["--scheduler", "impala", "--impala-config", "/no/such.yaml"], "cannot read it"),
        (["--scheduler", "impala", "--scheduler-cls", "a.B"], "drop one of them"),
        (["--scheduler", "impala", "--model", "/no/such/model"], None),
    ],
)
def test_each_mistake_gets_one_line(refused, parse, flags, says):
    if says is None:
        assert parse(*flags).scheduler_cls == choice.SCHEDULER  # the positional model wins
    else:
        assert says in refused(*flags)


NVME = ["--scheduler", "impala", "--impala-nvme-path"]


def test_an_nvme_directory_that_is_none_is_named(refused, tmp_path):
    (tmp_path / "file").touch()
    line = refused(*NVME, str(tmp_path / "file" / "kv"), "--impala-nvme-gib", "0.001")
    assert f"--impala-nvme-path: {tmp_path}/file/kv: {tmp_path}/file is not a directory; choose another one" in line


def test_an_nvme_tier_larger_than_the_free_space_is_refused_where_its_size_was_given(refused, tmp_path):
    (tmp_path / "i.yaml").write_text(f"tiers:\n  nvme_path: {tmp_path}/kv\n  nvme_gib: 1000000000\n")
    line = refused("--scheduler", "impala", "--impala-config", str(tmp_path / "i.yaml"))
    assert f"i.yaml: {tmp_path}/kv has " in line
    assert "GiB to spare, not 1e+09; lower tiers.nvme_gib, free some space" in line


CHECK_AS_ANYBODY = """
import argparse, os, sys
from impala_vllm.adapters.vllm import command_line
from impala_vllm.config import ConfigError, load
flags = {"tiers.nvme_path": ("--impala-nvme-path", sys.argv[1]), "tiers.nvme_gib": ("--impala-nvme-gib", 0.001)}
settings = load(None, flags)
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
try:
    command_line._check_nvme(argparse.Namespace(), settings)
except ConfigError as e:
    print(e)
"""


@pytest.mark.parametrize("beyond", ["", "kv"])
def test_an_nvme_directory_of_somebody_else_is_refused(tmp_path, beyond):
    (tmp_path / "theirs").mkdir(mode=0o500)  # root's, where root runs this
    asked = [sys.executable, "-c", CHECK_AS_ANYBODY, str(tmp_path / "theirs" / beyond)]
    line = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert line.startswith(f"--impala-nvme-path: {tmp_path}/theirs")
    assert "this user may not write to /" in line
    assert line.endswith("; allow it or choose another directory\n")


def test_a_good_nvme_directory_is_left_for_the_engine_to_make(parse, tmp_path):
    args = parse(*NVME, str(tmp_path / "a" / "kv"), "--impala-nvme-gib", "0.001")
    assert args.scheduler_cls == choice.SCHEDULER
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--impala-mode", "observe"],
        ["--kv-transfer-config", '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}'],
        ["--data-parallel-size", "2", "--data-parallel-size-local", "0"],
    ],
    ids=["observe", "other connector", "no rank here"],
)
def test_an_nvme_directory_that_nobody_here_uses_is_not_looked_at(parse, flags):
    args = parse(*NVME, "/dev/null/kv", "--impala-nvme-gib", "0.001", *flags)
    assert args.scheduler_cls == choice.SCHEDULER


def test_an_unknown_yaml_key_gets_a_hint(refused, tmp_path):
    (tmp_path / "i.yaml").write_text("identity:\n  max_trace: 9\n")
    assert "did you mean identity.max_traces?" in refused(
        "--scheduler", "impala", "--impala-config", str(tmp_path / "i.yaml")
    )


def test_a_missing_model_is_named(parser, capsys):
    with pytest.raises(SystemExit) as leaving:
        parser.parse_args(["/no/such/model", "--scheduler", "impala"])
    assert leaving.value.code == 2
    assert "model /no/such/model: no such file" in capsys.readouterr().err


def test_a_taken_port_is_named(refused, port):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", int(port)))
        taken.listen()
        assert f"port {port} is taken" in refused("--scheduler", "impala")


def test_an_unsupported_vllm_is_named(refused, monkeypatch):
    monkeypatch.setattr("vllm.version.__version__", "0.31.2")
    assert "vLLM 0.31.2 is not supported" in refused("--scheduler", "impala")


def test_a_changed_seam_is_named(refused, monkeypatch):
    broken = compat.Seam("vllm.v1.x:Y.z", "arrivals", "has no z")
    monkeypatch.setattr(compat, "check", lambda: [broken])
    assert "vllm.v1.x:Y.z: has no z; run `impala doctor`" in refused("--scheduler", "impala")


def test_a_model_the_hub_does_not_have_is_one_line(capsys):
    with pytest.raises(SystemExit) as leaving:
        command_line.fail_to_load("no/such", OSError("We couldn't connect\nto the hub"))
    assert leaving.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_tiers_that_cannot_be_are_one_line_where_the_command_line_asked(monkeypatch, capsys):
    def refuse(*_):
        raise ConfigError("tiers.nvme_path /kv: a replica spans 2 nodes")

    monkeypatch.setattr(tiering, "build", refuse)
    register()
    args = EngineArgs(model="m")
    args.scheduler_cls = choice.Choice.of(load(None))
    with pytest.raises(SystemExit) as leaving:
        args.create_engine_config()
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "impala: tiers.nvme_path /kv: a replica spans 2 nodes\n"
    args.scheduler_cls = choice.SCHEDULER
    with pytest.raises(ConfigError):
        args.create_engine_config()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("none/l.jsonl", "there is no directory"),
        (".", "not a regular file"),
    ],
)
def test_a_ledger_that_cannot_be_written_is_refused_before_anything_starts(refused, tmp_path, name, says):
    line = refused("--scheduler", "impala", "--impala-ledger", str(tmp_path / name))
    assert line.startswith("impala: --impala-ledger: ")
    assert says in line
    assert not list(tmp_path.iterdir())


def test_a_ledger_reaches_the_settings(parse, tmp_path):
    args = parse("--scheduler", "impala", "--impala-ledger", str(tmp_path / "l.jsonl"))
    assert restore(args.scheduler_cls.impala_settings).config.ledger.path == str(tmp_path / "l.jsonl")
    assert not list(tmp_path.iterdir())

"""What may be written where, and what stays when it cannot."""

import os

import pytest

from impala_vllm.cli import out_file
from impala_vllm.config import ConfigError


def test_a_device_a_pipe_and_a_directory_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for out in (tmp_path / "pipe", os.devnull, tmp_path, tmp_path / "none" / "out"):
        with pytest.raises(ConfigError, match="cannot"):
            out_file.check(type(tmp_path)(out), [], "the log")


def test_a_file_of_a_directory_of_logs_is_not_overwritten(tmp_path):
    (tmp_path / "a.jsonl").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "a.jsonl")
    for out in ("a.jsonl", "link"):
        with pytest.raises(ConfigError, match="the log itself"):
            out_file.check(tmp_path / out, [tmp_path], "the log")
    out_file.check(tmp_path / "new.jsonl", [tmp_path, tmp_path / "gone"], "the log")


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    out_file.write(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "out").read_text() == "text"


def test_what_cannot_be_written_leaves_the_older_file_and_nothing_else(tmp_path):
    (tmp_path / "out").write_text("older")
    with pytest.raises(UnicodeEncodeError):
        out_file.write(tmp_path / "out", "half\udcff")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("out", "older")]

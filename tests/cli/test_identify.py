"""`impala identify` from the outside: figures, files, exit codes."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import zstandard

from impala_vllm.cli.main import main

DATA = Path(__file__).parents[1] / "data"
AGENTS = DATA / "agents.requests.jsonl.zst"
SESSIONS = DATA / "sessions.weka.jsonl.zst"
GOOD = {
    "request_id": "r", "arrival_s": 0, "block_size": 16, "block_ids": [1], "input_tokens": 16, "output_tokens": 1
}  # fmt: skip


def run(*argv: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in argv])
    return int(stop.value.code or 0)


def figures(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> dict:  # type: ignore[type-arg]
    assert run("identify", *argv, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_hard_stacks_are_recognised_as_well_as_promised(capsys: pytest.CaptureFixture[str]) -> None:
    score = figures(capsys, AGENTS)["score"]
    assert score["link_f1"] >= 0.94
    assert score["precision"] == 1.0


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_sessions_and_their_subagents_are_recognised(capsys: pytest.CaptureFixture[str], seed: str) -> None:
    score = figures(capsys, SESSIONS, "--interleave", "3600", "--seed", seed)["score"]
    assert score["link_f1"] >= 0.98
    parents = score["parents"]
    assert parents["right"] > parents["wrong"] + parents["missed"]


def test_every_request_gets_a_line_and_truth_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    assert run("identify", AGENTS, "-o", out) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({line["request_id"] for line in lines}) == len(lines) > 200
    assert set(lines[0]) == {"request_id", "trace_id", "parent_trace_id", "source", "confidence"}
    assert "link F1" in capsys.readouterr().out

    blind = tmp_path / "blind.jsonl"
    records = [
        json.loads(line) for line in zstandard.ZstdDecompressor().stream_reader(AGENTS.read_bytes()).read().splitlines()
    ]
    blind.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "trace_id"}) + "\n" for r in records))
    again = tmp_path / "again.jsonl"
    assert run("identify", blind, "-o", again) == 0
    assert again.read_text() == out.read_text()


def test_what_happens_later_does_not_change_earlier_answers(tmp_path: Path) -> None:
    def line(number: int, at: float, blocks: Sequence[int]) -> str:
        record = {
            "request_id": f"r{number}",
            "arrival_s": at,
            "finish_s": at + 5,
            "block_size": 16,
            "block_ids": list(blocks),
            "input_tokens": 16 * len(blocks),
            "output_tokens": 16,
            "output_block_ids": [100 + number],
        }
        return json.dumps(record) + "\n"

    lines = [line(0, 0, [1, 2]), line(1, 1, [1, 2, 100]), line(2, 9, [1, 2, 100, 101, 3])]
    answers: list[str] = []
    for number in (1, 2, 3):
        log, out = tmp_path / "log.jsonl", tmp_path / "out.jsonl"
        log.write_text("".join(lines[:number]))
        assert run("identify", log, "-o", out) == 0
        answers.append(out.read_text())
    assert answers[2].startswith(answers[1])
    assert answers[1].startswith(answers[0])


@pytest.mark.parametrize(
    ("content", "argv"),
    [
        (b"", []),
        (b"\x00\xff\x00", []),
        (b'{"request_id": "r"', []),
        (b"{}\n", ["--format", "requests"]),
        (b"{}\n", ["--format", "nonsense"]),
        (b"{}\n", ["--nonsense"]),
        (b"[1, 2]", []),
        (b'{"messages": [], "arrival_s": 1, "tools": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", []),
        (b'{"id": "a", "block_size": 0, "requests": [{"type": "n", "t": 0, "hash_ids": [1], "in": 3}]}', []),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\n" + b"a" * 200_000 + b",1,2\n", []),
        (b"{}\n", ["--interleave", "nan"]),
        (None, []),
    ],
)
def test_bad_input_is_one_line_and_exit_2_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, argv: list[str]
) -> None:
    log, out = tmp_path / "log.jsonl", tmp_path / "out.jsonl"
    if content is not None:
        log.write_bytes(content)
    assert run("identify", log, "-o", out, *argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("impala: ")
    assert err.count("\n") == 1
    assert not out.exists()
    assert [p for p in tmp_path.iterdir() if p != log] == []


@pytest.mark.parametrize("kind", ["requests", "messages"])
def test_a_request_id_that_comes_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    log = tmp_path / "log.jsonl"
    line = {
        "requests": {"arrival_s": 0, "block_size": 16, "block_ids": [1], "input_tokens": 16},
        "messages": {"arrival_s": 0, "messages": [{"role": "user", "content": "x" * 200}]},
    }[kind]
    log.write_text(2 * (json.dumps({"request_id": "r", **line}) + "\n"))
    assert run("identify", log) == 2
    assert "log.jsonl:2: request_id r was there before" in capsys.readouterr().err


def test_only_a_regular_file_is_read_or_replaced_and_never_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, pipe, link = tmp_path / "log.jsonl", tmp_path / "pipe", tmp_path / "link"
    log.write_text(json.dumps(GOOD) + "\n")
    os.mkfifo(pipe)
    assert run("identify", pipe) == 2
    assert run("identify", log, "-o", pipe) == 2
    assert pipe.is_fifo()
    assert run("identify", log, "-o", log) == 2
    assert json.loads(log.read_text()) == GOOD
    assert capsys.readouterr().err.count("\n") == 3
    link.symlink_to(tmp_path / "out.jsonl")
    assert run("identify", log, "-o", link) == 0
    assert link.is_symlink()
    assert json.loads((tmp_path / "out.jsonl").read_text())["request_id"] == "r"


def test_a_corrupt_line_in_the_middle_leaves_an_older_output_alone(tmp_path: Path) -> None:
    log, out = tmp_path / "log.jsonl", tmp_path / "out.jsonl"
    log.write_text(json.dumps(GOOD) + "\n{broken\n")
    out.write_text("older")
    assert run("identify", log, "-o", out) == 2
    assert out.read_text() == "older"


def test_ids_that_are_not_chained_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({**GOOD, "block_ids": [1, 1]}) + "\n")
    assert run("identify", log) == 2
    assert "log.jsonl:1: an id comes twice" in capsys.readouterr().err


def test_version_and_help() -> None:
    assert run("--version") == 0
    assert run("--help") == 0
    assert run() == 2


def test_without_a_command_the_help_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert any(line.strip().startswith("identify ") for line in capsys.readouterr().err.splitlines())

"""`impala audit` from the outside: tables, JSON, exit codes."""

import json
from pathlib import Path

import pytest

from impala_vllm.cli.main import main

BLOCKS = Path(__file__).parents[1] / "data" / "sessions.weka.jsonl.zst"


@pytest.fixture
def log(tmp_path):
    """Six turns of one session, each with the time at the head of its system prompt."""
    path = tmp_path / "chat[s].jsonl"
    tools = [{"type": "function", "function": {"name": n, "parameters": {"type": "object"}}} for n in ("look", "[b]")]
    messages = [{"role": "system", "content": ""}]
    with path.open("w") as out:
        for turn in range(6):
            messages[0]["content"] = f"It is 2026-11-24 10:0{turn}:00. " + "Answer from the handbook. " * 50
            messages.append({"role": "user", "content": f"question {turn}"})
            record = {"request_id": f"r{turn}", "session_id": "[s]", "arrival_s": turn, "tools": tools}
            out.write(json.dumps({**record, "messages": messages}) + "\n")
            messages.append({"role": "assistant", "content": f"answer {turn}"})
    return path


def run(*argv: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["audit", *map(str, argv)])
    return int(stop.value.code or 0)


def test_the_table_names_cause_fix_money_and_idle_tools_within_80_columns(log, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(log, "--price-per-mtok", "3") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    for words in (
        "timestamp",
        "system",
        "Move the clock",
        "cost",
        "Tools: 2",
        "never",
        "tools never called",
        "[b]",
        "[s]",
        "estimated",
    ):
        assert words in out
    assert "2026-11-24" not in out


def test_nonces_are_held_only_where_asked_for(log, capsys):
    assert run(log, "--normalise") == 0
    out = capsys.readouterr().out
    assert "timestamp" not in out
    assert "5 prompts count as if" in out


def test_fragments_are_shown_only_where_asked_for(log, capsys):
    assert run(log, "--show-text") == 0
    assert "is 2026-11-24 10:0" in capsys.readouterr().out


def test_the_json_adds_up(log, capsys):
    assert run(log, "--json", "--price-per-mtok", "2.5") == 0
    found = json.loads(capsys.readouterr().out)
    (cause,) = found["causes"]
    assert (cause["cause"], cause["turns"], cause["sessions"]) == ("timestamp", 5, 1)
    assert cause["segments"] == {"system": 5}
    assert cause["cost"] == pytest.approx(cause["lost_tokens"] * 2.5e-6, abs=1e-6)
    assert found["lost_tokens"] == cause["lost_tokens"] == sum(w["lost_tokens"] for w in found["worst"])
    assert found["tokens_are_estimated"]
    assert (found["requests"], found["sessions"], found["resumed"], found["skipped"]) == (6, 1, 5, 0)


def test_block_ids_say_where_without_a_cause(capsys):
    assert run(BLOCKS, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["tokens_are_estimated"]
    assert {c["cause"] for c in found["causes"]} == {"blocks differ"}
    assert found["lost_tokens"] > 0


def test_bad_lines_are_counted_and_only_a_useless_log_exits_with_2(log, tmp_path, capsys):
    log.write_text("{broken\n" + log.read_text())
    assert run(log) == 0
    assert "1 lines or files were skipped" in capsys.readouterr().out
    useless = tmp_path / "useless.jsonl"
    for content in ("", "{broken\n", '{"a": 1}\n'):
        useless.write_text(content)
        assert run(useless) == 2
        err = capsys.readouterr().err
        assert err.startswith("impala: ")
        assert err.count("\n") == 1
    assert run(tmp_path / "missing") == 2
    assert run(log, "--price-per-mtok", "nan") == 2
    assert run(BLOCKS, "--format", "messages") == 2

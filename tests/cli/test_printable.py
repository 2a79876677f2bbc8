"""Names in logs may hold anything; a terminal is shown nothing but text."""

import json

import pytest

from impala_vllm.cli.main import main
from impala_vllm.cli.printable import printable

HOSTILE = "\x1b]0;owned\x07[/b]$\u202e"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain, é", "plain, é"), ("a\nb", "a\nb"), ("\x1b[31m\x07", "\\x1b[31m\\x07"), ("\udcff", "\\udcff")],
)
def test_control_characters_are_shown_as_escapes(text, shown):
    assert printable(text) == shown


def test_an_error_and_a_table_hold_no_control_characters_of_a_log(tmp_path, capsys):
    request = {"request_id": HOSTILE, "arrival_s": 0.0, "block_size": 16, "block_ids": [1], "input_tokens": 20}
    (tmp_path / "twice.jsonl").write_text(2 * (json.dumps(request) + "\n"))
    assert run("identify", tmp_path / "twice.jsonl") == 2
    system = [{"role": "system", "content": f"It is 10:0{i}:00. " + "Answer. " * 99} for i in range(2)]
    asked, answered = {"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}
    prompts = ([system[0], asked], [system[1], asked, answered, asked])
    chats = [
        {"request_id": str(i), "session_id": HOSTILE, "arrival_s": i, "messages": messages}
        for i, messages in enumerate(prompts)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    assert run("audit", tmp_path / "chats.jsonl", "--show-text") == 0
    captured = capsys.readouterr()
    assert "\\x1b]0;owned" in captured.out
    assert "\\x1b]0;owned" in captured.err
    assert not any(c in captured.out + captured.err for c in "\x1b\x07\u202e")


def run(*argv):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    return int(stop.value.code or 0)

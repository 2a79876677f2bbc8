"""Readers of every log format, and how they fail."""

import json
from pathlib import Path

import pytest
import zstandard

from impala_vllm.core.types import Outcome
from impala_vllm.workload import Format, WorkloadError, read

WEKA = {
    "id": "s1", "block_size": 64, "tool_tokens": 64, "system_tokens": 70,
    "requests": [
        {"t": 0, "type": "n", "model": "m", "in": 200, "out": 9, "hash_ids": [1, 2, 3], "stop": "tool_use",
         "api_time": 2},
        {"t": 12.5, "type": "subagent", "agent_id": "a1", "duration_ms": 10000, "tool_tokens": 64, "system_tokens": 0,
         "requests": [{"t": 1, "type": "s", "model": "m", "in": 70, "out": 5, "hash_ids": [7], "stop": "end_turn"}]},
        {"t": 20, "type": "s", "model": "m", "in": 270, "out": 9, "hash_ids": [1, 2, 3, 4], "stop": "end_turn"},
    ],
}  # fmt: skip
REQUEST = {
    "request_id": "r", "arrival_s": 1.0, "block_size": 16, "block_ids": [1], "input_tokens": 20, "output_tokens": 3
}  # fmt: skip
CHAT = {"request_id": "c", "arrival_s": 0.5, "messages": [{"role": "user", "content": "x" * 200}], "later_key": 1}


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_weka_ids_are_local_to_a_session_but_for_the_stem(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", WEKA, {**WEKA, "id": "s2"})
    one, child, last, other, *_ = read(log)
    assert one.blocks[:2] == other.blocks[:2]
    assert one.blocks[2] != other.blocks[2]
    assert last.blocks[:3] == one.blocks
    assert (one.outcome, one.finish_s) == (Outcome.TOOL_CALL, 2.0)
    assert (child.arrival_s, child.parent_trace_id) == (3.5, "s1")
    assert child.trace_id not in ("s1", "s2")


def test_request_logs_keep_the_order_of_arrival(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", REQUEST, {**REQUEST, "arrival_s": 0.5})
    with pytest.raises(WorkloadError, match=r"log\.jsonl:2: .*sort the log"):
        list(read(log))


def test_bad_lines_can_be_left_out_and_each_is_named(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(
        json.dumps(REQUEST) + '\n{"request_id": "x"}\n{"cut o\n\n' + json.dumps({**REQUEST, "request_id": "s"}) + "\n"
    )
    errors: list[str] = []
    turns = list(read(log, on_error=lambda e: errors.append(str(e))))
    assert len(turns) == 2
    assert [e.split(": ")[0].rsplit(":", 1)[1] for e in errors] == ["2", "3"]


def test_messages_extend_their_history(tmp_path: Path) -> None:
    more = [*CHAT["messages"], {"role": "assistant", "content": "yes"}, {"role": "user", "content": "y" * 100}]  # type: ignore[misc]
    first, second = read(
        write(tmp_path / "log.jsonl", {**CHAT, "output": "yes"}, {**CHAT, "request_id": "d", "messages": more})
    )
    assert second.blocks[: len(first.blocks)] == first.blocks
    assert first.block_size == 16
    assert len(first.blocks) == 3


@pytest.mark.parametrize("stamp", [1760995776.5, 1760995776500.0, 1760995776500000.0])
def test_agent_traces_are_sorted_and_come_in_any_unit(tmp_path: Path, stamp: float) -> None:
    step = stamp / 1760995776.5
    log = write(
        tmp_path / "s.jsonl",
        {"timestamp": stamp + step, "input": "b" * 64, "output": "", "session_id": "x"},
        {"timestamp": stamp, "input": "a" * 64, "output": "", "session_id": "x"},
    )
    first, second = read(log, Format.MESSAGES)
    assert first.arrival_s == pytest.approx(1760995776.5)
    assert second.arrival_s == pytest.approx(1760995777.5)
    assert first.session_id is None
    assert first.trace_id == "x"


def test_trajectories_become_one_turn_an_answer(tmp_path: Path) -> None:
    said = [{"role": r, "content": "z" * 80} for r in ("system", "user", "assistant", "tool", "assistant")]
    log = tmp_path / "t.json"
    log.write_text(json.dumps([{"task_id": 0, "traj": said}], indent=1))
    first, second = read(log)
    assert second.blocks[: len(first.blocks)] == first.blocks


def test_mooncake_and_azure(tmp_path: Path) -> None:
    record = {"timestamp": 2000, "input_length": 1030, "output_length": 5, "hash_ids": [0, 1, 2]}
    (turn,) = read(write(tmp_path / "m.jsonl", record))
    assert (turn.arrival_s, turn.blocks) == (2.0, (0, 1))
    azure = tmp_path / "a.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,40,10\n2023-11-16 18:17:05.0,16,1\n"
    )
    one, two = read(azure)
    assert two.arrival_s == pytest.approx(1.02004)
    assert not set(one.blocks) & set(two.blocks)


def test_directories_and_zstandard(tmp_path: Path) -> None:
    data = zstandard.compress((json.dumps(REQUEST) + "\n").encode())
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    write(tmp_path / "b.jsonl", REQUEST)
    assert len(list(read(tmp_path))) == 2
    (tmp_path / "a.jsonl.zst").write_bytes(data[:-8])
    with pytest.raises(WorkloadError):
        list(read(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\x00\x01\xff\xfe", b"[]", b"null\n", b"hello\n", b'{"a": 1}\n', b"\xff{"])
def test_what_is_no_log_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    log = tmp_path / "x.bin"
    log.write_bytes(content)
    with pytest.raises(WorkloadError) as error:
        list(read(log))
    assert str(error.value).startswith(str(log))
    assert "\n" not in str(error.value)


def test_trajectories_of_two_files_are_told_apart(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y"}]
    for name in ("one.json", "two.json"):
        (tmp_path / name).write_text(json.dumps([{"task_id": 0, "traj": said}]))
    first, second = read(tmp_path)
    assert first.trace_id != second.trace_id
    assert first.request_id != second.request_id

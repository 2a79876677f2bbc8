"""Reading ledgers back: in the order they were written, past everything that cannot be read."""

import json

import msgspec
import pytest

from impala_vllm.insight.ledger.read import MAX_LINE_BYTES, Reading, neighbours, read
from impala_vllm.insight.ledger.record import Header, Record

HEADER = Header("aa", 1.0)


def line(name, **fields):
    return msgspec.json.encode(Record(f"aa/{name}", 1.0, 2.0, **fields)) + b"\n"


def traces(path):
    reading = Reading()
    return [found.trace for found in read(path, reading) if isinstance(found, Record)], reading


def test_rotated_and_live_parts_are_read_in_the_order_they_were_written(tmp_path):
    for name, trace in (
        ("l.jsonl.10", "t0"),
        ("l.jsonl.2", "t1"),
        ("l.jsonl.1", "t2"),
        ("l.jsonl", "t3"),
        ("l.jsonl.live", "t4"),
    ):
        (tmp_path / name).write_bytes(line(trace))
    for name in ("l.jsonl.live.partial", "l.jsonl.bak", "other.jsonl.1"):
        (tmp_path / name).write_bytes(line("stranger"))
    found, reading = traces(tmp_path / "l.jsonl")
    assert found == [f"aa/t{i}" for i in range(5)]
    assert [p.name for p in reading.files] == ["l.jsonl.10", "l.jsonl.2", "l.jsonl.1", "l.jsonl", "l.jsonl.live"]


def test_a_name_with_stars_finds_only_its_own_parts(tmp_path):
    (tmp_path / "l[1]*.jsonl").write_bytes(line("t1"))
    (tmp_path / "l[1]*.jsonl.1").write_bytes(line("t0"))
    (tmp_path / "l1x.jsonl.1").write_bytes(line("stranger"))
    assert traces(tmp_path / "l[1]*.jsonl")[0] == ["aa/t0", "aa/t1"]


@pytest.mark.parametrize(
    "bad",
    [
        b'{"kind":"trace","trace":"aa/t',
        b"not json\n",
        b"\xff\xfe\x00\n",
        b"[]\n",
        b'{"kind":"other"}\n',
        b'{"kind":"trace","trace":5,"start":1,"end":2}\n',
        b'{"kind":"trace","trace":"x"}\n',
        b"[" * 100_000 + b"\n",
        b'{"kind":"trace","trace":"' + b"x" * MAX_LINE_BYTES + b'"}\n',
    ],
)
def test_what_cannot_be_read_is_counted_and_the_rest_is_read(tmp_path, bad):
    (tmp_path / "l.jsonl").write_bytes(line("t1") + b"\n" + bad.rstrip(b"\n") + b"\n" + line("t2"))
    found, reading = traces(tmp_path / "l.jsonl")
    assert found == ["aa/t1", "aa/t2"]
    assert reading.corrupt >= 1
    assert reading.first_problem is not None
    assert "l.jsonl:3: " in reading.first_problem


def test_records_of_a_newer_version_are_told_apart_from_corrupt_ones(tmp_path):
    newer = {"kind": "trace", "trace": {"is": "now an object"}, "v": 2}
    readable = {"kind": "trace", "trace": "aa/t9", "start": 1, "end": 2, "v": 3}
    text = line("t1") + json.dumps(newer).encode() + b"\n" + json.dumps(readable).encode() + b"\n"
    (tmp_path / "l.jsonl").write_bytes(text)
    found, reading = traces(tmp_path / "l.jsonl")
    assert found == ["aa/t1"]
    assert (reading.newer, reading.corrupt) == (2, 0)


def test_fields_that_a_later_writer_added_do_no_harm(tmp_path):
    (tmp_path / "l.jsonl").write_bytes(b'{"kind":"trace","trace":"aa/t1","start":1,"end":2,"colour":"red"}\n')
    assert traces(tmp_path / "l.jsonl")[0] == ["aa/t1"]


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    assert neighbours(tmp_path / "none.jsonl") == []
    with pytest.raises(OSError, match=r"none\.jsonl"):
        list(read(tmp_path / "none.jsonl", Reading()))

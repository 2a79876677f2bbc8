"""The ledger's file: whole lines, private, bounded, and a disk's trouble stays its own."""

import json
import os
import stat

import msgspec
import pytest

from impala_vllm.insight.ledger import writer as writing
from impala_vllm.insight.ledger.record import Again, Header, Record, Stall, Tokens, Unlinked
from impala_vllm.insight.ledger.writer import Writer

ROW = (0, 10, 1000, 20, 900, 1)


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "POLL_S", 0.001)
    writers = []

    def start(run="aa", max_bytes=1 << 20, keep=3, **more):
        writers.append(Writer(tmp_path / "l.jsonl", Header(run, 1.0), max_bytes, keep, **more))
        return writers[-1]

    yield start
    for writer in writers:
        writer.close()


def record(name, live=False, **fields):
    return Record(**{"trace": f"aa/{name}", "start": 1.0, "end": 2.0, "live": live, **fields})


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def names(path):
    return [line["trace"] for line in lines(path) if line["kind"] == "trace"]


def test_finished_traces_are_appended_and_live_ones_lie_beside(start, tmp_path):
    writer = start()
    assert writer.put(record("t1", tokens=Tokens(computed=3)))
    assert writer.put(record("t2", live=True))
    writer.close()
    assert [line["kind"] for line in lines(tmp_path / "l.jsonl")] == ["server", "trace"]
    assert names(tmp_path / "l.jsonl") == ["aa/t1"]
    assert names(tmp_path / "l.jsonl.live") == ["aa/t2"]
    assert writer.counts.records == 1


def test_only_the_owner_may_read_any_of_it(start, tmp_path):
    old = os.umask(0)
    try:
        writer = start(max_bytes=400)
        for i in range(9):
            writer.put(record(f"t{i}", live=i == 0))
        writer.close()
    finally:
        os.umask(old)
    files = sorted(tmp_path.iterdir())
    assert len(files) >= 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_torn_line_is_closed_before_anything_is_added(start, tmp_path):
    (tmp_path / "l.jsonl").write_bytes(b'{"kind":"trace","trace":"zz/t')
    writer = start()
    writer.put(record("t1"))
    writer.close()
    torn, *rest = (tmp_path / "l.jsonl").read_bytes().splitlines()
    assert torn.endswith(b"zz/t")
    assert [json.loads(line)["kind"] for line in rest] == ["server", "trace"]


def test_what_a_dead_server_left_of_live_traces_is_kept(start, tmp_path):
    first = start("aa")
    first.put(record("t1", live=True))
    first.close()
    second = start("bb")
    second.put(msgspec.structs.replace(record("t2", live=True), trace="bb/t2"))
    second.close()
    assert names(tmp_path / "l.jsonl") == ["aa/t1"]
    assert names(tmp_path / "l.jsonl.live") == ["bb/t2"]


def test_a_file_made_anew_leaves_live_traces_where_they_are(start, tmp_path):
    writer = start()
    writer.put(record("t1", live=True))
    writer.put(Unlinked("aa", 1.0, turns=1))
    _until(lambda: (tmp_path / "l.jsonl.live").exists())
    (tmp_path / "l.jsonl").rename(tmp_path / "archived.jsonl")
    writer.put(record("t2"))
    _until(lambda: writer.counts.records == 1)
    assert [line["kind"] for line in lines(tmp_path / "l.jsonl")] == ["server", "trace"]
    assert names(tmp_path / "l.jsonl.live") == ["aa/t1"]


def test_the_file_is_rotated_by_size_and_the_oldest_goes(start, tmp_path):
    writer = start(max_bytes=2000, keep=2)
    for i in range(4000):
        while not writer.put(record(f"t{i}")):
            pass
    writer.close()
    files = sorted(p.name for p in tmp_path.iterdir())
    assert [f for f in files if ".live" not in f] == ["l.jsonl", "l.jsonl.1", "l.jsonl.2"]
    kept = [n for f in ("l.jsonl.2", "l.jsonl.1", "l.jsonl") for n in names(tmp_path / f)]
    numbers = [int(n.removeprefix("aa/t")) for n in kept]
    assert numbers == list(range(numbers[0], 4000))
    assert writer.counts.records == 4000


def test_rows_are_left_out_once_their_byte_budget_is_spent(start, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "LOG_BYTES_AT_ONCE", 500.0)
    writer = start(clock=lambda: 0.0)
    for i in range(4):
        writer.put(record(f"t{i}", log=(ROW,) * 10))
    writer.close()
    rows = [len(line.get("log", ())) for line in lines(tmp_path / "l.jsonl")[1:]]
    assert rows == [10, 10, 0, 0]
    assert writer.counts.bare == 2


def test_a_full_queue_refuses_and_counts(start, monkeypatch):
    monkeypatch.setattr(writing, "POLL_S", 3600.0)
    monkeypatch.setattr(writing, "MAX_QUEUED", 2)
    writer = start()
    assert [writer.put(record(f"t{i}")) for i in range(3)] == [True, True, False]
    assert writer.counts.refused == 1


def test_a_directory_that_goes_away_costs_records_and_nothing_else(start, tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    writer = Writer(folder / "l.jsonl", Header("aa", 1.0), 1 << 20, 1)
    writer.put(record("t1"))
    _until(lambda: writer.counts.records == 1)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    writer.put(record("t2"))
    _until(lambda: writer.counts.lost == 1)
    assert writer.counts.trouble == "No such file or directory"
    folder.mkdir()
    writer._again_s = 0.0  # it would look again within a minute
    writer.put(record("t3"))
    _until(lambda: writer.counts.trouble is None)
    writer.close()
    assert names(folder / "l.jsonl") == ["aa/t3"]


def test_a_full_disk_is_counted(start, tmp_path, caplog):
    writer = Writer(tmp_path / "full.jsonl", Header("aa", 1.0), 1 << 20, 1)
    writer.put(record("t0"))
    _until(lambda: writer.counts.records == 1)
    (tmp_path / "full.jsonl").unlink()
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    writer.put(record("t1"))
    _until(lambda: writer.counts.lost == 1)
    assert writer.counts.trouble == "No space left on device"
    writer.put(record("t2"))
    _until(lambda: writer.counts.lost == 2)
    assert len([r for r in caplog.records if "cannot be written" in r.message]) == 1
    writer.close()


def test_a_listener_that_fails_costs_no_record(start, tmp_path):
    def explode(_):
        raise ValueError("inner details")

    writer = start(on_final=explode)
    writer.put(record("t1"))
    writer.put(record("t2"))
    writer.close()
    assert names(tmp_path / "l.jsonl") == ["aa/t1", "aa/t2"]


def test_a_second_server_on_the_same_file_is_refused(start, tmp_path):
    first = start("aa")
    first.put(record("t1"))
    _until(lambda: first.counts.records == 1)
    second = start("bb")
    second.put(record("t2"))
    _until(lambda: second.counts.lost == 1)
    second.close()
    first.close()
    assert names(tmp_path / "l.jsonl") == ["aa/t1"]


def test_a_file_that_is_moved_away_is_made_anew(start, tmp_path):
    writer = start()
    writer.put(record("t1"))
    _until(lambda: writer.counts.records == 1)
    (tmp_path / "l.jsonl").rename(tmp_path / "archived.jsonl")
    writer.put(record("t2"))
    _until(lambda: writer.counts.records == 2)
    writer.close()
    assert names(tmp_path / "archived.jsonl") == ["aa/t1"]
    assert names(tmp_path / "l.jsonl") == ["aa/t2"]


def test_a_day_of_a_hundred_thousand_traces_stays_below_a_hundred_megabytes():
    full = record(
        "t99999",
        parent="deadbeef/t99998",
        session="0123456789abcdef",
        tenant="0123456789abcdef",
        start=1764000000.123,
        end=1764003600.123,
        turns=40,
        sources={"new": 1, "continuation": 37, "rollback": 1, "compaction": 1},
        confidence=0.953,
        outcome="ended",
        tokens=Tokens(1234567, 1234567, 1234567, 1234567, 0, 123456),
        again=Again(1234567, 123456, 0, 12345),
        stall=Stall(12.345, 123.456, 1.234, 123.456, 123.456),
        preemptions=2,
        failures=1,
        gpu_s=123.456789,
        gap_s=1234.567891,
        longest_gap_s=123.456,
        gaps=39,
        stem="0123456789abcdef",
    )
    bare = len(msgspec.json.encode(full))
    assert 100_000 * bare + 86_400 * writing.LOG_BYTES_PER_S + writing.LOG_BYTES_AT_ONCE < 1e8
    assert 500 < bare < 680


def _until(condition):
    import time

    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)

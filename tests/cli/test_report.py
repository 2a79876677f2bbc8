"""`impala report`: tables, JSON and a page of a ledger, and what is wrong with one in a line."""

import json

import msgspec
import pytest
from click.testing import CliRunner

from impala_vllm.cli.main import impala, main
from impala_vllm.insight.ledger.record import Again, Header, Record, Stall, Tokens

HEADER = Header("aa", 1_000_000.0, mode="observe", block=16, hbm=2048)


def trace(number, **fields):
    """Two turns of a kilotoken, with a tool between them."""
    start = 1_000_000.0 + 2.0 * number
    known = {
        "turns": 2,
        "outcome": "ended",
        "tokens": Tokens(computed=1200, hbm=320, output=40 + number),
        "again": Again(evicted=300),
        "gpu_s": 0.5 + 0.01 * number,
        "stall": Stall(queue=1.0, prefill=1.0, decode=2.0),
        "gap_s": 4.0,
        "log": ((0, 2000, 640, 20, 0, 0), (6000, 2000, 880, 20, 640, 1)),
    }
    return Record(**{"trace": f"aa/t{number}", "start": start, "end": start + 8.0, **known, **fields})


@pytest.fixture
def ledger(tmp_path):
    file = tmp_path / "l.jsonl"
    write(file, HEADER, *(trace(i) for i in range(20)))
    return file


def write(file, *lines):
    file.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def run(*args):
    return CliRunner().invoke(impala, ["report", *map(str, args)])


def failing(capsys, *args):
    with pytest.raises(SystemExit) as leaving:
        main(["report", *map(str, args)])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return leaving.value.code, captured.err


def test_the_tables_say_tasks_money_and_what_to_do(ledger):
    done = run(ledger, "--price-per-gpu-hour", "2")
    assert done.exit_code == 0
    for words in (
        "tasks per dollar", "Where the time went", "Longest stalls", "simulated, not measured", "Assumed:",
        "- timing", "evicted",
    ):  # fmt: skip
        assert words in done.output


def test_json_holds_everything_and_nothing_else_is_printed(ledger):
    found = json.loads(run(ledger, "--json", "--price-per-gpu-hour", "2").output)
    assert (found["tasks"], found["turns"], found["tokens"]["computed"]) == (20, 40, 24000)
    assert found["stall"]["quantiles"]["p50"] == 4.0
    assert found["money"]["cost"] == pytest.approx(46 / 3600 * 2)
    assert found["counterfactual"]["simulated"] is True
    assert set(found["counterfactual"]["policies"]) == {"stock", "impala", "unbounded"}
    assert found["reading"]["corrupt"] == 0


def test_the_simulation_computes_what_the_ledger_says_is_new(ledger):
    policies = json.loads(run(ledger, "--json").output)["counterfactual"]["policies"]
    assert policies["unbounded"]["hit_ratio"] == pytest.approx(20 * 640 / (20 * 1520), abs=0.01)
    assert policies["stock"]["hit_ratio"] <= policies["unbounded"]["hit_ratio"]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([HEADER, *(trace(i, log=()) for i in range(3))], "rows of turns"),
        ([trace(i) for i in range(3)], "header"),
        ([Header("aa", 1.0), *(trace(i) for i in range(3))], "block size"),
        ([Header("aa", 1.0, block=16, hbm=64), *(trace(i) for i in range(3))], "HBM"),
    ],
)
def test_a_ledger_that_cannot_be_simulated_says_why_and_the_rest_is_told(tmp_path, lines, reason):
    write(tmp_path / "l.jsonl", *lines)
    found = json.loads(run(tmp_path / "l.jsonl", "--json").output)
    assert reason in found["counterfactual"]["reason"]
    assert found["tasks"] == 3


def test_corrupt_lines_and_newer_records_are_counted_and_skipped(ledger):
    with ledger.open("ab") as file:
        file.write(b'{"kind":"trace","trace":"aa/t1","v":9}\n{"kind":"trace","trace":"aa/t')
    found = json.loads(run(ledger, "--json", "--no-simulation").output)["reading"]
    assert (found["corrupt"], found["newer"]) == (1, 1)
    done = run(ledger, "--no-simulation")
    assert done.exit_code == 0
    assert "1 could not be read and 1 are of a" in " ".join(done.output.split())


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"not json\n", b'{"kind":"trace","v":9}\n', b'{"kind":"server","run":"a","at":1}\n']
)
def test_a_file_with_nothing_usable_is_one_line_and_2(tmp_path, capsys, content):
    (tmp_path / "l.jsonl").write_bytes(content)
    code, line = failing(capsys, tmp_path / "l.jsonl")
    assert code == 2
    assert "no trace in it" in line


def test_a_file_that_is_not_there_is_one_line_and_2(tmp_path, capsys):
    code, line = failing(capsys, tmp_path / "none.jsonl")
    assert (code, "No such file" in line) == (2, True)


@pytest.mark.parametrize("file", [".", "/", ""])
def test_a_directory_is_no_ledger(capsys, file):
    code, line = failing(capsys, file)
    assert (code, "cannot read it (Is a directory)" in line) == (2, True)


def test_names_in_a_ledger_are_neither_markup_nor_html(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    hostile = "aa</b><script>alert(1)</script>[/b]$x_{\x1b"
    write(
        tmp_path / "l.jsonl",
        msgspec.structs.replace(HEADER, run=hostile),
        trace(1, trace=f"{hostile}/t1", outcome=hostile),
    )
    assert run(tmp_path / "l.jsonl", "--html", tmp_path / "out.html").exit_code == 0
    page = (tmp_path / "out.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "</b>&lt;" not in page


def test_a_page_is_written_whole_or_not_at_all(ledger, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert run(ledger, "--html", tmp_path / "out.html", "--no-simulation").exit_code == 0
    page = (tmp_path / "out.html").read_text()
    assert page.count("<svg") == 4
    assert "simulated, not measured" in page
    before = ledger.read_bytes()
    for out in (ledger, tmp_path, tmp_path / "none" / "out.html"):
        assert failing(capsys, ledger, "--html", out)[0] == 2
    assert ledger.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l.jsonl", "out.html"]


@pytest.mark.parametrize("price", ["-1", "nan", "free"])
def test_a_price_that_is_none_is_refused(ledger, capsys, price):
    assert failing(capsys, ledger, "--price-per-gpu-hour", price)[0] == 2


DEVICES = [
    Header("aa", 1_000_000.0, device="NVIDIA H200", block=16, hbm=2048),
    trace(1, start=1_000_000.0, end=1_003_600.0),
    Header("bb", 1_000_000.0, device="NVIDIA H100 80GB HBM3", block=16, hbm=2048, gpus=2),
    trace(1, trace="bb/t1", start=1_000_000.0, end=1_001_800.0),
]


def test_a_price_table_prices_each_device_by_its_longest_name(tmp_path):
    write(tmp_path / "l.jsonl", *DEVICES)
    (tmp_path / "prices.yaml").write_text("nvidia: 9\nNVIDIA H200: 4\nh100 80gb hbm3: 2\n")
    done = json.loads(
        run(tmp_path / "l.jsonl", "--json", "--no-simulation", "--prices", tmp_path / "prices.yaml").output
    )
    assert done["money"]["cost"] == pytest.approx(1 * 4 + 0.5 * 2 * 2)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("NVIDIA H200: 4\n", "no price for 'NVIDIA H100 80GB HBM3'; add a line like"),
        ("NVIDIA H200: dear\n", "NVIDIA H200: 'dear' is no price"),
        ("NVIDIA: -1\n", "is no price"),
        ("NVIDIA: .inf\n", "is no price"),
        ("3: 4\n", "is no price"),
        ("just text\n", "no price table"),
        ("a: [\n", "no YAML"),
        ("", "no price table"),
    ],
)
def test_a_price_table_that_does_not_do_is_one_line_and_2(tmp_path, capsys, text, line):
    write(tmp_path / "l.jsonl", *DEVICES)
    (tmp_path / "prices.yaml").write_text(text)
    code, error = failing(capsys, tmp_path / "l.jsonl", "--prices", tmp_path / "prices.yaml")
    assert code == 2
    assert line in error

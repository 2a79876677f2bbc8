"""The identity benchmark on the bundled samples: baseline beside ours, records, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from click.testing import CliRunner, Result

from benchmarks import record, report
from benchmarks.identity import figures
from benchmarks.identity.__main__ import main
from benchmarks.identity.naive import Naive
from benchmarks.identity.trial import Trial, replay
from benchmarks.record import Record
from impala_vllm.core.identity import Identity, IdentityConfig
from impala_vllm.core.types import Arrival, Namespace, RequestId
from impala_vllm.workload import interleave, load

DATA = Path(__file__).parents[1] / "data"
AGENTS = DATA / "agents.requests.jsonl.zst"
SESSIONS = DATA / "sessions.weka.jsonl.zst"


def run(*argv: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, argv), "--no-record"])


def trials(log: Path, spread_s: float, seed: int) -> list[Trial]:
    turns = interleave(load(log), spread_s, Random(seed))
    ours = Identity(IdentityConfig())
    return [replay("naive", Naive(), turns, int), replay("impala", ours, turns, int)]


def made(log: Path) -> list[Record]:
    runs = [*trials(log, 3600, 0), *trials(log, 3600, 1)]
    return figures.records("identity/sample", {"log": log.name}, None, runs, record.origin("python -m x"))


def value(records: list[Record], variant: str, metric: str) -> float:
    return next(r.p50 for r in records if (r.variant, r.metric) == (variant, metric))


@pytest.mark.parametrize("log", [AGENTS, SESSIONS], ids=["agents", "sessions"])
def test_a_naive_owner_links_worse_than_we_do(log: Path) -> None:
    records = made(log)
    for metric in ("link F1", "predecessor F1"):
        assert value(records, "naive", metric) < value(records, "impala", metric)
    assert value(records, "naive", "link F1") < value(records, "naive", "predecessor F1")  # it mixes traces
    assert {r.n for r in records} == {2}


def test_every_subagent_counts_once() -> None:
    records = made(SESSIONS)
    ends = ("with the right parent", "with a wrong parent", "without a parent")
    for variant in ("naive", "impala"):
        assert sum(value(records, variant, f"sub-agents {end}") for end in ends) == 13
    assert {r.params["of"] for r in records if r.metric == "subagent start right"} == {"13"}
    assert value(records, "naive", "sub-agents with the right parent") == 0
    assert value(records, "impala", "sub-agents with the right parent") > 0
    assert not [r for r in made(AGENTS) if r.metric.startswith("sub-agents")]


def test_the_same_seed_gives_the_same_figures() -> None:
    once, again = (
        [(r.variant, r.metric, r.p20, r.p50, r.p80) for r in made(SESSIONS) if r.unit != "us"] for _ in range(2)
    )
    assert once == again


def test_records_come_back_and_get_a_chapter_of_their_own(tmp_path: Path) -> None:
    records = made(SESSIONS)
    assert record.read([record.append(records, tmp_path)]) == records
    served = replace(records[0], question="serving/baseline", variant="stock")
    serving, identity = report.render([*records, served]).split("\n## Identity\n")
    assert "| stock | link F1 |" in serving
    assert "| impala | link F1 |" not in serving
    assert "### sample" in identity
    assert "| impala | link F1 |" in identity


def test_the_command_prints_both_variants() -> None:
    result = run("--traces", SESSIONS, "--interleave", "3600", "--seeds", "0")
    assert result.exit_code == 0, result.output
    assert "naive" in result.stdout
    assert "link F1" in result.stdout
    assert any("subagent" in row and "13" in row for row in result.stdout.splitlines())


def test_naive_needs_four_blocks_and_keeps_namespaces_apart() -> None:
    naive = Naive()

    def arrive(name: str, blocks: list[int], tenant: str = "") -> str:
        return naive.arrive(Arrival(RequestId(name), blocks, 16 * len(blocks), Namespace(tenant)), 0.0).trace_id

    first = arrive("a", [1, 2, 3, 4, 5])
    assert arrive("b", [1, 2, 3, 9]) != first
    assert arrive("c", [1, 2, 3, 4, 5], tenant="other") != first
    assert arrive("d", [1, 2, 3, 4, 5, 6]) == first


def test_a_naive_owner_that_believes_less_starts_more_traces() -> None:
    turns = load(AGENTS)
    one, four = (replay("naive", Naive(blocks), turns, int).num_traces for blocks in (1, 4))
    assert one < four


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--traces", "missing.jsonl"], "cannot read it"),
        (["--traces", str(SESSIONS), "--interleave", "60", "--seeds", "a"], "whole numbers with commas"),
        (["--traces", str(SESSIONS), "--interleave", "inf"], "number of seconds"),
        (["--traces", str(SESSIONS), "--name", "a/b"], "letters, digits"),
        (["--traces", str(SESSIONS), "--block-tokens", "32"], "leave out --block-tokens"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options: list[str], says: str) -> None:
    result = run(*options)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_log_without_truth_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    line = {
        "request_id": "r", "arrival_s": 0, "finish_s": 1, "block_size": 16, "block_ids": [1, 2],
        "input_tokens": 32, "output_tokens": 1,
    }  # fmt: skip
    log.write_text(json.dumps(line) + "\n")
    result = run("--traces", log)
    assert result.exit_code == 2
    assert "ground truth" in result.stderr


def test_text_can_be_cut_into_other_blocks(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    chat = {"request_id": "r", "arrival_s": 0, "messages": [{"role": "user", "content": "x" * 400}]}
    log.write_text(json.dumps(chat) + "\n")
    assert [(t.block_size, len(t.blocks)) for t in load(log, block_tokens=32)] == [(32, 3)]
    assert [(t.block_size, len(t.blocks)) for t in load(log)] == [(16, 6)]

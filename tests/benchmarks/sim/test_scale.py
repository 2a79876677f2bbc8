"""The scale run: what is generated, and what is said of it."""

from pathlib import Path
from random import Random

import pytest
from click.testing import CliRunner

from benchmarks import record, targets
from benchmarks.sim import scale
from impala_vllm.sim import timing

SESSIONS = Path(__file__).parents[2] / "data" / "sessions.weka.jsonl.zst"


def test_requests_share_instructions_and_nothing_else():
    made = scale.generated(200, 5, Random(0))
    assert made == scale.generated(200, 5, Random(0))
    assert made.num_turns() == len({t.request_id for t in made.turns()}) == 200
    assert len({t.keys[: scale.STEM_BLOCKS] for t in made.turns()}) == 5
    own = [key for t in made.turns() for key in t.keys[scale.STEM_BLOCKS :]]
    assert len(own) == len(set(own))
    assert all(len(t.keys) == t.num_tokens // made.block_size for t in made.turns())


def test_twice_the_replicas_are_sent_as_much_in_half_the_time():
    made, engine = scale.generated(50, 2, Random(0)), timing.load(timing.DEFAULT)
    one, two = (scale.spread(made, engine, n) for n in (1, 2))
    assert one.arrivals.spread_s == pytest.approx(2 * two.arrivals.spread_s)
    assert (two.num_replicas, two.hbm_tokens) == (2, engine.hbm_tokens)


@pytest.mark.parametrize("policy", ["stock", "impala"])
def test_a_small_one_says_how_long_it_took(policy):
    arguments = ["--replicas", "3", "--requests", "60", "--policy", policy, "--no-record"]
    result = CliRunner().invoke(scale.main, arguments)
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert f"{policy}: 60 generated requests on 3 replicas" in words
    assert "GiB at most" in words


def test_a_log_is_served_as_it_was_recorded():
    result = CliRunner().invoke(scale.main, ["--traces", str(SESSIONS), "--sessions", "2", "--no-record"])
    assert result.exit_code == 0, result.output
    assert "recorded sessions on 1 replicas" in " ".join(result.output.split())


def test_no_log_is_one_line_and_exit_2(tmp_path):
    result = CliRunner().invoke(scale.main, ["--traces", str(tmp_path / "none"), "--no-record"])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1


def test_the_bars_are_rows_of_the_targets():
    params = {"load": "generated requests", "replicas": 1000, "requests": 1_000_000}
    made = scale._records(record.origin(), "impala", params, 60_000.0, 7.5, 0)
    made += scale._records(record.origin(), "impala", {**params, "load": "recorded sessions"}, 40_000.0, 1.0, 0)
    rows = [t for t in targets.TARGETS if t.question == "micro/simulator"]
    found = [t.found(made) for t in rows]
    assert [(r is not None and r.p50, r is not None and t.is_met(r.p50)) for t, r in zip(rows, found, strict=True)] == [
        (7.5, True),
        (40_000.0, False),
    ]

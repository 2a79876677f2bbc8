"""Measured records as cases of the simulator: what they say is read whole, and what is off is said."""

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm")

from benchmarks.record import Origin
from benchmarks.sim import measured
from benchmarks.sim.measured import Case, Compared
from impala_vllm.sim import timing
from tests.sim.test_simulation import agents

ORIGIN = Origin("abc", {"vllm": "1"}, "a machine", "a command")
PARAMS = {
    "log": "kct.jsonl",
    "tasks": 16,
    "requests": 160,
    "prompt tokens": 327690,
    "scale": "first 10 turns, prompts /32, outputs /8 (4-48 tokens), gaps /6 capped at 15 s",
    "load": "closed loop, whole batch, starts over 5 s",
    "engine": "model tiny-8m-557ef847ce45, float32, HBM pool 298 blocks of 32 = 9,536 tokens, context 8,192",
}
TIERS = "host 1x HBM (15,000 tokens/s), NVMe 8x (uncapped)"
CASE = Case("serving/agents-4x", 8, 48, 1, 6, "8m", 40, 4, {}, {"stock": 1.0, "impala-enforce": 1.0}, {}, 0)


def records(question: str, arms: dict[str, tuple[float, float]], **more: Any):
    return [
        ORIGIN.record(question, arm, {**PARAMS, **more}, metric, "", "-", [value], seed=3)
        for arm, figures in arms.items()
        for metric, value in zip(("stall_mean_s", "cached_share"), figures, strict=True)
    ]


def test_a_record_is_read_with_its_load_pool_and_links():
    made = records("serving/tiers-4x", {"stock-lru-fs": (200.0, 0.2), "impala-tiers": (70.0, 0.8)}, tiers=TIERS)
    assert list(measured.cases(made, "kct.jsonl")) == [
        Case(
            "serving/tiers-4x", 16, 160, 327690, 10, "8m", 298, 32, {"host": (1.0, 15000.0), "NVMe": (8.0, None)},
            {"stock-lru-fs": 200.0, "impala-tiers": 70.0}, {"stock-lru-fs": 0.2, "impala-tiers": 0.8}, 3,
        )
    ]  # fmt: skip
    assert not list(measured.cases(made, "another.jsonl"))


def test_the_newest_run_of_a_load_counts_and_what_cannot_be_simulated_does_not():
    old = records("serving/agents-4x", {"stock": (200.0, 0.0), "impala-enforce": (70.0, 0.5)})
    new = [
        replace(r, commit="def")
        for r in records("serving/agents-4x", {"stock": (9.0, 0.0), "impala-enforce": (3.0, 0.5)})
    ]
    odd = records("serving/agents-2x", {"stock": (200.0, 0.0), "lmcache": (70.0, 0.5)})
    unknown = records(
        "serving/agents",
        {"stock": (2.0, 0.0), "impala-enforce": (7.0, 0.5)},
        engine="model big-70b-1, HBM pool 9 blocks of 32",
    )
    open_loop = records("serving/agents-8x", {"stock": (2.0, 0.0), "impala-enforce": (7.0, 0.5)}, load="open loop")
    found = list(measured.cases([*old, *new, *odd, *open_loop, *unknown], "kct.jsonl"))
    assert [c.stall_s["stock"] for c in found] == [9.0]


def test_all_arms_are_simulated_on_the_pool_of_the_record():
    load, engine = agents(), timing.load("cpu-8m-avx2")
    found = measured.compare(replace(CASE, hit_ratio={"stock": 0.5, "impala-enforce": 0.5}), load, engine)
    assert [(c.arm, c.simulated_stall == 1.0) for c in found] == [("stock", True), ("impala-enforce", False)]
    roomy = measured.compare(replace(CASE, num_blocks=4000, hit_ratio={"stock": 1, "impala-enforce": 1}), load, engine)
    assert roomy[0].simulated_hits > found[0].simulated_hits


def test_what_is_off_and_what_changes_places_is_said():
    engine = timing.load("cpu-8m-avx2")
    good = (
        Compared(CASE, engine, "stock", 1.0, 1.0, 0.004, 0.011),
        Compared(CASE, engine, "impala-enforce", 0.3, 0.33, 0.6, 0.55),
    )
    assert [c.is_close for c in good] == [True, True]
    assert measured.same_ranking(good)
    assert not replace(good[1], simulated_stall=0.4).is_close
    assert not replace(good[1], simulated_hits=0.5).is_close
    assert not measured.same_ranking([good[0], replace(good[1], simulated_stall=1.1)])

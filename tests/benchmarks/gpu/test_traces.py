"""Sessions of a size that fits, from whatever there is to read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import bundle, traces
from benchmarks.gpu.sessions import Pool
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.traces import Room
from impala_vllm.replay.plan import Plan, PlannedSession, PlannedTurn
from impala_vllm.replay.vocabulary import Vocabulary

WORDS = Vocabulary(10, 4000, 2, 3)
ROOM = Room(max_context_tokens=4096, prefill_tokens_per_s=10_000, prefill_s=4)


@pytest.fixture(autouse=True)
def _nothing_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(traces, "PREPARED", tmp_path / "none.jsonl")


def test_prompts_shrink_until_they_fit_time_and_context():
    assert Room(1000, 10.0, 1.0).factor([4, 6]) == 1
    assert Room(1000, 10.0, 1.0).factor([4, 7]) == 2
    assert Room(100, 1e9, 1.0).factor([90, 91]) == 2
    assert Room(1, 1.0, 1.0).factor([10_000_000]) == traces.FACTORS[-1]


def test_bundled_sessions_fit_the_room_and_stay_sessions():
    found = traces.sessions(ROOM, WORDS)
    assert found.source == "bundled sessions"
    assert len(found.plan.roots()) > 3
    assert found.plan.prompt_tokens() <= 1.1 * ROOM.prefill_s * ROOM.prefill_tokens_per_s
    assert all(len(t.prompt) + len(t.output) <= ROOM.max_context_tokens for _, _, t in found.plan.turns())
    assert all(len(s.turns) <= traces.NUM_TURNS for s in found.plan.sessions)
    # Most of a prompt was in the one before: that is what there is to keep.
    assert found.plan.new_tokens(16) < 0.5 * found.plan.prompt_tokens()


def test_a_prepared_log_gives_the_plan_of_the_log_it_was_made_of(tmp_path: Path):
    prepared = tmp_path / "sessions.jsonl"
    assert traces.prepare(None, prepared) == traces.sessions(ROOM, WORDS).plan.num_turns()
    found, wanted = traces.sessions(ROOM, WORDS, prepared), traces.sessions(ROOM, WORDS)
    assert found.source == "sessions.jsonl"
    assert _shape(found.plan) == _shape(wanted.plan)


def test_without_a_reader_sessions_are_made_up_and_said_to_be():
    program = (
        "import sys; sys.modules['zstandard'] = None\n"
        "from benchmarks.gpu import traces\n"
        "from impala_vllm.replay.vocabulary import Vocabulary\n"
        "found = traces.sessions(traces.Room(4096, 10_000, 4), Vocabulary(10, 4000, 2, 3))\n"
        "plan = found.plan\n"
        "print(found.source, len(plan.roots()), plan.new_tokens(16) < 0.5 * plan.prompt_tokens(),\n"
        "      max(len(t.prompt) for _, _, t in plan.turns()) <= 4096)"
    )
    env = {**os.environ, "PYTHONPATH": str(bundle.ROOT)}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=120)
    assert found.stdout.split("\n")[0] == "made-up sessions 16 True True", found.stderr[-2000:]


def test_the_pool_holds_a_quarter_of_the_working_set_and_always_the_longest_turn():
    shape = SHAPES["8b"]
    long = PlannedTurn("a", tuple(range(1000)), (1,) * 24, 0.0)
    short = [PlannedTurn(f"b{i}", tuple(range(5000 + 900 * i, 5900 + 900 * i)), (1,) * 100, 0.0) for i in range(9)]
    alone = Plan((PlannedSession("a", (long,)),))
    many = Plan((*alone.sessions, *(PlannedSession(t.request_id, (t,)) for t in short)))
    assert Pool.of(alone, shape, 16, 1 << 40).num_blocks * 16 >= 1024
    assert Pool.of(alone, shape, 16, 1 << 40).max_model_len >= 1025
    # All of 10,024 tokens, a quarter of them, and vLLM's block of zeros.
    assert Pool.of(many, shape, 16, 1 << 40).num_blocks == -(-2506 // 16) + 1
    assert Pool.of(many, shape, 16, 1 << 40).host_bytes == 2 * 158 * 16 * 147_456
    assert Pool.of(many, shape, 16, 5).host_bytes == 5


def test_shapes_have_about_the_parameters_they_are_named_for():
    assert SHAPES["1b"].parameters == pytest.approx(1.72e9, rel=0.02)
    assert SHAPES["8b"].parameters == pytest.approx(8.19e9, rel=0.02)


def _shape(plan: Plan) -> list[tuple[int, ...]]:
    return sorted(tuple(len(t.prompt) for t in s.turns) for s in plan.sessions)

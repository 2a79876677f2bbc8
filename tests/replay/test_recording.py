"""Choosing sessions, and the log we ship."""

from pathlib import Path

import pytest

from impala_vllm.replay import recording
from impala_vllm.replay.lowering import Scale, lower
from impala_vllm.replay.vocabulary import Vocabulary
from impala_vllm.workload import WorkloadError


def test_the_bundled_log_holds_eight_sessions_and_a_sub_agent() -> None:
    turns = recording.choose(recording.bundled())
    roots = {t.trace_id for t in turns if t.parent_trace_id is None}
    children = {t.trace_id for t in turns if t.parent_trace_id is not None}
    assert (len(roots), len(children), len(turns)) == (8, 1, 104)


def test_the_bundled_log_keeps_its_licence_beside_it() -> None:
    folder = recording.bundled().parent
    assert "Apache License" in (folder / "sessions.LICENSE").read_text()
    assert "kv-cache-tester" in (folder / "sessions.md").read_text()


def test_most_bundled_turns_continue_the_one_before(vocabulary: Vocabulary) -> None:
    plan = lower(recording.choose(recording.bundled()), Scale(), vocabulary)
    pairs = [(a, b) for s in plan.sessions for a, b in zip(s.turns, s.turns[1:], strict=False)]
    continued = [b.prompt[: len(a.prompt + a.output)] == a.prompt + a.output for a, b in pairs]
    assert sum(continued) > 0.7 * len(pairs)


def test_the_choice_depends_on_the_seed_only() -> None:
    path = recording.bundled()
    first = recording.choose(path, 3, seed=1)
    assert first == recording.choose(path, 3, seed=1)
    assert len({t.recording for t in first}) == 3


def test_asking_for_more_than_there_is_says_so() -> None:
    with pytest.raises(WorkloadError, match="8 sessions of at least 12 turns that fit, 9 asked for"):
        recording.choose(recording.bundled(), 9, min_turns=12)


def test_a_damaged_log_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl.zst"
    path.write_bytes(recording.bundled().read_bytes()[:2000])
    with pytest.raises(WorkloadError) as caught:
        recording.choose(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)

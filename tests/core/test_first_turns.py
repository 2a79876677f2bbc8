"""How likely a second turn is, by kind, from first turns that ended one way or another."""

import pytest

from impala_vllm.core import first_turns
from impala_vllm.core.first_turns import MAX_QUIET, QUIET_S, FirstTurns


def test_the_chance_of_a_second_turn_is_a_share_of_the_first_ones_seen() -> None:
    turns = FirstTurns()
    for has_second in (True, False):
        turns.saw("kind", has_second)
    assert turns.chance("kind") is None
    turns.saw("kind", False)
    # Forgetting within three is a few percent.
    assert turns.chance("kind") == pytest.approx(1 / 3, rel=0.03)


def test_what_a_kind_did_long_ago_is_forgotten() -> None:
    turns = FirstTurns()
    for _ in range(100):
        turns.saw("kind", True)
    for _ in range(200):
        turns.saw("kind", False)
    chance = turns.chance("kind")
    assert chance is not None
    assert chance < 0.05


def test_a_turn_that_said_nothing_counts_once_it_has_been_silent_for_a_while() -> None:
    turns = FirstTurns()
    for now in (0.0, 1.0, 2.0):
        turns.said_nothing("kind", now)
    turns.listen(1.0 + QUIET_S)
    assert turns.chance("kind") is None, "two of three"
    turns.listen(2.0 + QUIET_S)
    assert turns.chance("kind") == 0.0


def test_who_comes_back_before_silence_speaks_counts_once() -> None:
    turns = FirstTurns()
    for _ in range(4):
        turns.said_nothing("kind", 0.0)
    turns.came_back("kind")
    assert turns.chance("kind") is None
    turns.listen(QUIET_S)
    assert turns.chance("kind") == pytest.approx(1 / 4, rel=0.06)


def test_a_chance_is_a_chance_whoever_comes_back() -> None:
    turns = FirstTurns()
    for _ in range(3):
        turns.saw("kind", True)
        turns.came_back("kind")
    assert turns.chance("kind") == 1.0


def test_no_more_silences_are_remembered_than_fit_and_the_oldest_speak_first() -> None:
    turns = FirstTurns()
    for _ in range(3):
        turns.said_nothing("old", 0.0)
    for _ in range(MAX_QUIET):
        turns.said_nothing("new", 0.0)
    turns.listen(0.0)
    assert turns.chance("old") == 0.0
    assert turns.chance("new") is None


def test_no_more_kinds_are_known_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_turns, "MAX_KINDS", 2)
    turns = FirstTurns()
    for kind in ("a", "b", "a", "c"):
        for _ in range(3):
            turns.saw(kind, True)
    turns.came_back("d")
    assert [turns.chance(kind) for kind in "abcd"] == [None, None, 1.0, None]

"""What fails is done once more; who fails twice keeps what there is; an interrupt costs the repetition it came in."""

import pytest

from benchmarks.fleet.attempts import Attempts, said
from benchmarks.fleet.outcome import Outcome

GOOD = Outcome(1.0, 100.0, 0.5, 1.1, 16, 0)
PART = Outcome(0.1, 900.0, 0.5, 1.1, 16, failures=3)


class Runs:
    """Does what it is told on the n-th call of an arm in a repetition."""

    def __init__(self, **told: list[Outcome | BaseException]) -> None:
        self.told = {name: list(outcomes) for name, outcomes in told.items()}
        self.asked: list[tuple[str, int]] = []

    def __call__(self, name: str, number: int) -> Outcome:
        self.asked.append((name, number))
        outcome = self.told[name].pop(0) if self.told.get(name) else GOOD
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def done(runs: Runs, repetitions: int = 3) -> Attempts:
    attempts = Attempts(["a", "b"], {"c": "not installed"})
    attempts.run(runs, repetitions)
    return attempts


def test_every_second_repetition_goes_backwards():
    runs = Runs()
    assert done(runs).found == {name: dict.fromkeys(range(3), GOOD) for name in "ab"}
    assert runs.asked == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]


@pytest.mark.parametrize("fault", [OSError("no port"), TimeoutError(), ValueError("an odd answer"), PART])
def test_what_fails_once_is_done_again_and_told(fault):
    attempts = done(Runs(a=[GOOD, fault]))
    assert attempts.found["a"] == dict.fromkeys(range(3), GOOD)
    assert attempts.faults == {"c": "not installed"}
    assert [told.partition(":")[0] for told in attempts.again] == ["a in 1"]


def test_who_fails_twice_keeps_what_there_is_and_is_asked_no_further():
    runs = Runs(a=[GOOD, OSError("gone"), OSError("gone again")])
    attempts = done(runs)
    assert attempts.found == {"a": {0: GOOD}, "b": dict.fromkeys(range(3), GOOD)}
    assert attempts.faults["a"] == "OSError: gone again"
    assert ("a", 2) not in runs.asked


def test_an_arm_that_fails_turns_is_kept_as_such_and_asked_again():
    attempts = done(Runs(a=[PART, PART]))
    assert attempts.found["a"] == {0: PART, 1: GOOD, 2: GOOD}
    assert attempts.faults["a"] == "3 turns failed at 16 servers"


def test_an_interrupt_leaves_the_repetitions_that_are_whole():
    attempts = Attempts(["a", "b"], {})
    with pytest.raises(KeyboardInterrupt):
        attempts.run(Runs(a=[GOOD, GOOD, GOOD], b=[GOOD, GOOD, KeyboardInterrupt()]), 4)
    assert attempts.found == {name: {0: GOOD, 1: GOOD} for name in "ab"}


def test_why_names_no_place_of_this_machine():
    error = OSError(
        "it: exited with 1: cannot open /home/somebody/x.so (log: /a/b/out/fleet/it-0-1.log), http://h:1/x/y"
    )
    assert said(error) == "OSError: it: exited with 1: cannot open x.so (log: it-0-1.log), http://h:1/x/y"

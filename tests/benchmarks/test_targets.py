"""The table of targets: what is looked for, what is found, and what it is called."""

from typing import Any

from benchmarks.record import Origin, Record
from benchmarks.targets import TARGETS, Target, table

ORIGIN = Origin("abc", {"vllm": "1"}, "a machine", "a command")
STALL = Target("stall", "serving/agents-4x", "stall_mean_s ratio", at_most=0.26, params={"tasks": 16}, note="Why.")


def made(value: float, question: str = "serving/agents-4x", tasks: int = 16, **more: Any) -> Record:
    source = "simulated" if question.startswith("sim") else "measured"
    params = {"tasks": tasks, **more}
    return ORIGIN.record(question, "impala-enforce", params, "stall_mean_s ratio", "x", "lower", [value], source=source)


def row(*records: Record, target: Target = STALL) -> str:
    return table(records, (target,))[-1]


def test_a_target_within_its_bound_is_met() -> None:
    assert row(made(0.26, interval="0.2-0.3")) == "| stall | <= 0.26 | 0.26 | 0.2-0.3 | 1 | real | met |"


def test_a_missed_target_says_so_and_why() -> None:
    assert row(made(0.27)).endswith("| **not met** Why. |")


def test_a_figure_that_lacks_some_of_those_it_is_compared_with_says_so() -> None:
    told = {"short of": "one: 1 of 5 (it died)"}
    assert row(made(0.2, **told)).endswith("| met; short of one: 1 of 5 (it died) |")


def test_the_newest_record_counts() -> None:
    assert "| 0.2 |" in row(made(0.4), made(0.2))


def test_a_real_engine_goes_before_a_later_run_in_virtual_time() -> None:
    assert "| 0.4 |" in row(made(0.4), made(0.2, "sim/agents-4x"))
    assert "| virtual time |" in row(made(0.2, "sim/agents-4x"))


def test_virtual_time_stands_in_only_where_its_records_are_of_the_same() -> None:
    target = Target("stall", "serving/agents-4x", "stall_mean_s ratio", at_most=0.26, is_measured=True)
    assert row(made(0.2, "sim/agents-4x"), target=target).endswith("| not measured |")
    assert "| 0.2 |" in row(made(0.2), target=target)


def test_another_load_is_another_matter() -> None:
    assert row(made(0.2, tasks=8)).endswith("| not measured |")


def test_a_bound_from_below_is_kept_from_above() -> None:
    target = Target("tasks", "serving/agents-4x", "stall_mean_s ratio", at_least=1.35)
    assert [target.is_met(v) for v in (1.3, 1.35, 2.0)] == [False, True, True]
    assert target.asks() == ">= 1.35"


def test_every_target_has_one_bound() -> None:
    assert all((t.at_most is None) != (t.at_least is None) for t in TARGETS)

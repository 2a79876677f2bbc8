"""Whom we are compared with, and in what."""

from benchmarks.fleet.outcome import Outcome, best_rival, ratios, records, summary
from benchmarks.record import Origin

ORIGIN = Origin("abc", {"vllm": "1"}, "a machine", "a command")


def made(stall_s: float, tasks: float) -> Outcome:
    return Outcome(stall_s, tasks, 0.5, 1.1, 16, 0)


FOUND = {
    "sticky": [made(1.0, 900.0)] * 3,
    "one": [made(9.0, 300.0), made(5.0, 300.0), made(5.0, 330.0)],
    "two": [made(6.0, 400.0), made(6.0, 400.0), made(6.0, 440.0)],
    "impala": [made(3.0, 500.0), made(4.0, 500.0), made(4.0, 500.0)],
}


def test_the_best_rival_is_a_router_and_another_one_for_another_metric():
    assert best_rival(FOUND, "stall_mean_s") == "one"
    assert best_rival(FOUND, "tasks_per_hour") == "two"


def test_ratios_are_of_the_same_repetition():
    assert ratios(FOUND, "stall_mean_s") == ("one", [3.0 / 9.0, 0.8, 0.8])
    assert ratios(FOUND, "tasks_per_hour") == ("two", [1.25, 1.25, 500.0 / 440.0])


def test_without_rivals_or_without_us_there_is_nothing_to_compare():
    assert ratios({"impala": FOUND["impala"], "sticky": FOUND["sticky"]}, "stall_mean_s") is None
    assert ratios({"one": FOUND["one"]}, "stall_mean_s") is None
    assert len(summary({"one": FOUND["one"], "dropped": []})) == 1


def test_records_say_whom_the_ratio_is_to():
    found = [r for r in records(FOUND, {"servers": 16}, ORIGIN) if r.metric == "tasks_per_hour ratio"]
    assert [(r.variant, r.params["to"], r.p50, r.n) for r in found] == [("impala", "two", 1.25, 3)]
    assert found[0].params["interval"] == "1.1364-1.2500 (75%)"

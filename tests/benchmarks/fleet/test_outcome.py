"""Whom we are compared with, and in what."""

from benchmarks.fleet.clients import Waited
from benchmarks.fleet.emulated import Served
from benchmarks.fleet.outcome import Outcome, compared, records, short, summary
from benchmarks.record import Origin

ORIGIN = Origin("abc", {"vllm": "1"}, "a machine", "a command")


def made(stall_s: float, tasks: float) -> Outcome:
    return Outcome(stall_s, tasks, 0.5, 1.1, 16, 0)


def numbered(*outcomes: Outcome) -> dict[int, Outcome]:
    return dict(enumerate(outcomes))


FOUND = {
    "sticky": numbered(*[made(1.0, 900.0)] * 3),
    "one": numbered(made(9.0, 300.0), made(5.0, 300.0), made(5.0, 330.0)),
    "two": numbered(made(6.0, 400.0), made(6.0, 400.0), made(6.0, 440.0)),
    "impala": numbered(made(3.0, 500.0), made(4.0, 500.0), made(4.0, 500.0)),
}
FAILS = Outcome(0.001, 1e6, 0.5, 1.1, 16, failures=1)
"""It refuses at once, as nobody can serve."""
IDLE = Outcome(0.001, 1e6, 0.0, 0.0, servers_used=0, failures=0)


def test_the_best_rival_is_a_router_and_another_one_for_another_metric_repetition_by_repetition():
    assert compared(FOUND, "stall_mean_s") == ("one", [3.0 / 9.0, 0.8, 0.8])
    assert compared(FOUND, "tasks_per_hour") == ("two", [1.25, 1.25, 500.0 / 440.0])


def test_without_rivals_or_without_us_there_is_nothing_to_compare():
    assert compared({"impala": FOUND["impala"], "sticky": FOUND["sticky"]}, "stall_mean_s") is None
    assert compared({"one": FOUND["one"]}, "stall_mean_s") is None
    assert len(summary({"one": FOUND["one"], "dropped": {}}, {})) == 1


def test_records_say_whom_the_ratio_is_to():
    found = [r for r in records(FOUND, {}, {"servers": 16}, ORIGIN) if r.metric == "tasks_per_hour ratio"]
    assert [(r.variant, r.params["to"], r.p50, r.n) for r in found] == [("impala", "two", 1.25, 3)]
    assert found[0].params["interval"] == "1.1364-1.2500 (75%)"
    assert "short of" not in found[0].params


def test_a_rival_that_fails_later_keeps_what_it_had_and_every_record_says_so():
    found = {**FOUND, "one": {1: made(5.0, 300.0)}, "never": {}}
    assert compared(found, "stall_mean_s") == ("one", [0.8])
    faults = {"one": "it died", "never": "it did not start", "absent": "no command", "sticky": "whatever"}
    told = {r.params["short of"] for r in records(found, faults, {}, ORIGIN)}
    assert told == {"one: 1 of 3 (it died); never: 0 of 3 (it did not start); absent: 0 of 3 (no command)"}
    assert sum("0 of 3 (no command)" in line for line in summary(found, faults)) == 2


def test_where_we_failed_later_every_record_says_so():
    found = {**FOUND, "impala": {0: made(3.0, 500.0)}}
    assert {r.params["short of"] for r in records(found, {"impala": "it died"}, {}, ORIGIN)} == {
        "impala: 1 of 3 (it died)"
    }


def test_a_repetition_in_which_an_arm_did_not_serve_every_turn_is_not_compared():
    for odd in (FAILS, IDLE):
        found = FOUND | {"one": numbered(made(9.0, 300.0), odd, made(5.0, 330.0))}
        assert compared(found, "stall_mean_s") == ("two", [0.5, 4.0 / 6.0, 4.0 / 6.0])
        assert compared(found | {"two": {}}, "stall_mean_s") == ("one", [3.0 / 9.0, 0.8])
        assert short(found, {}) == "one: 2 of 3"
        assert compared(FOUND | {"impala": numbered(odd, *[made(3.0, 500.0)] * 2)}, "stall_mean_s") is None


def test_of_an_arm_that_did_not_serve_every_turn_only_counts_are_told():
    found = FOUND | {"three": numbered(*[FAILS] * 3)}
    made = {r.metric: r.p50 for r in records(found, {}, {}, ORIGIN) if r.variant == "three"}
    assert made == {"servers_used": 16, "failures": 1}
    assert [line for line in summary(found, {}) if "did not serve every turn" in line] == [summary(found, {})[4]]


def test_a_run_that_reached_no_server_has_an_outcome():
    waited = Waited(makespan_s=2.0, stalls_s=[0.0, 0.0], num_failures=6)
    outcome = Outcome.of(waited, [Served(), Served()])
    assert (outcome.failures, outcome.servers_used, outcome.hit_ratio, outcome.spread) == (6, 0, 0.0, 0.0)
    assert not outcome.is_whole()

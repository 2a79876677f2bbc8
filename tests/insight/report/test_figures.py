"""A ledger's figures: of the newest record of each trace, adding up, and advice that fits them."""

import msgspec
import pytest

from impala_vllm.insight.ledger.record import Again, Header, Line, Record, Stall, Tokens, Unlinked
from impala_vllm.insight.report import Totals, advise, figures
from impala_vllm.insight.report.page import Page, Simulated


def record(name, **fields):
    run = fields.pop("run", "aa")
    known = {"start": 0.0, "end": 10.0, "turns": 2, "outcome": "ended", "tokens": Tokens(computed=60, hbm=40, output=8)}
    known |= {"gap_s": 4.0, "stall": Stall(queue=2.0, prefill=1.0, decode=3.0), "gpu_s": 2.0}
    return Record(**{"trace": f"{run}/{name}", **known, **fields})


def gathered(*lines):
    totals = Totals()
    for line in lines:
        totals.add(msgspec.json.decode(msgspec.json.encode(line), type=Line))
    return totals


def test_of_two_records_of_a_trace_the_later_one_counts():
    first = record("t1", outcome="silent", turns=1, live=True, end=5.0)
    totals = gathered(first, record("t1", turns=3), first, record("t1", outcome="silent", live=True), record("t2"))
    found = figures(totals)
    assert (found.traces, found.tasks, found.turns, totals.superseded) == (2, 2, 5, 3)


def test_tasks_are_traces_without_a_parent_that_have_ended():
    found = figures(gathered(record("t1"), record("t2", parent="aa/t1"), record("t3", outcome="running")))
    assert (found.traces, found.tasks, found.open_traces) == (3, 1, 1)
    assert found.tokens["computed"] == 180, "tokens of children and of live traces are there all the same"


def test_money_is_for_the_time_of_every_device_idle_time_included():
    lines = [Header("aa", 0.0, gpus=2), record("t1", end=1800.0), record("t2", start=1800.0, end=3600.0)]
    found = figures(gathered(*lines))
    assert (found.gpu_hours, found.wall_s, found.tasks_per_hour) == (2.0, 3600.0, 2.0)
    money = found.money(3.0)
    assert (money["cost"], money["tasks_per_dollar"], money["cost_per_task"]) == (6.0, 2 / 6, 3.0)
    assert found.busy_share == pytest.approx(4.0 / 7200)


def test_engines_side_by_side_share_the_wall_clock_and_not_the_bill():
    lines = [
        record("t1", end=3600.0),
        record("t1", run="bb", end=3600.0),
        record("t1", run="cc", start=7200.0, end=9000.0),
    ]
    found = figures(gathered(*lines))
    assert (found.wall_s, found.gpu_hours) == (5400.0, 2.5)


def test_completion_is_tools_and_stall():
    found = figures(gathered(*(record(f"t{i}", end=10.0 + i, gap_s=4.0 + i) for i in range(5))))
    assert found.jct is not None
    assert found.stall is not None
    assert (found.jct.mean, found.stall.mean, found.stall.max) == (12.0, 6.0, 6.0)
    assert sum(found.time_s.values()) == pytest.approx(5 * found.jct.mean)


def test_the_cost_of_a_token_is_what_fits_best():
    lines = [
        record(f"t{i}", tokens=Tokens(computed=100 * i, output=7 * i * i), gpu_s=100 * i * 2e-4 + 7 * i * i * 3e-3)
        for i in range(1, 12)
    ]
    found = figures(gathered(*lines, record("x", again=Again(evicted=30), gpu_s=60 * 2e-4 + 8 * 3e-3, end=99.0)))
    assert found.rates is not None
    assert (found.rates.prompt_s, found.rates.output_s) == (pytest.approx(2e-4), pytest.approx(3e-3))
    assert found.device_s is not None
    assert found.device_s["evicted"] == pytest.approx(30 * 2e-4)
    assert sum(found.device_s.values()) == pytest.approx(found.gpu_hours * 3600)


def test_costs_that_cannot_be_told_apart_are_not_guessed():
    found = figures(gathered(*(record(f"t{i}") for i in range(20))))
    assert (found.rates, found.device_s) == (None, None)


def test_requests_without_a_trace_are_in_the_sums_once():
    rest = [
        Unlinked("aa", 5.0, turns=1, tokens=Tokens(computed=5)),
        Unlinked("aa", 6.0, turns=3, tokens=Tokens(computed=9)),
    ]
    found = figures(gathered(record("t1"), *rest))
    assert (found.tokens["computed"], found.unlinked_turns) == (69, 3)


def test_successes_are_the_clients_word():
    lines = [
        record("t1", outcome="success", reported=True),
        record("t2", outcome="failure", reported=True),
        record("t3"),
    ]
    found = figures(gathered(*lines))
    assert (found.reported, found.succeeded) == (2, 1)
    assert found.outcomes == {"success": 1, "failure": 1, "ended": 1}


def symptoms(*lines, mode="observe"):
    return [a.symptom for a in advise(figures(gathered(*lines)), mode)]


@pytest.mark.parametrize(
    ("fields", "symptom"),
    [
        ({"again": Again(evicted=50)}, "KV was evicted before it was needed again"),
        ({"again": Again(rewritten=50)}, "clients change what they have sent before"),
        ({"again": Again(preempted=50)}, "turns were preempted"),
        ({"stall": Stall(hold=5.0)}, "admission holds turns back"),
        ({"stall": Stall(load=5.0)}, "loading KV takes long"),
        ({"stall": Stall(queue=5.0)}, "turns wait for a place"),
        ({"failures": 1}, "turns fail or are hung up on"),
        ({"gpu_s": 0.1}, "devices are idle"),
    ],
)
def test_each_symptom_is_named(fields, symptom):
    assert symptom in symptoms(record("t1", **fields))


def test_a_healthy_ledger_is_left_alone():
    assert symptoms(record("t1", gpu_s=9.0, stall=Stall(queue=0.5, prefill=2.0, decode=2.0))) == []


def test_only_who_observes_is_told_to_enforce():
    def remedies(mode):
        return " ".join(a.remedy for a in advise(figures(gathered(record("t1", again=Again(evicted=50)))), mode))

    assert "enforce" in remedies("observe")
    assert "enforce" not in remedies("enforce")


def test_a_page_of_a_single_live_trace_can_be_drawn():
    pytest.importorskip("matplotlib")
    from impala_vllm.insight.ledger.read import Reading

    for line in (record("t<1>", outcome="running", stall=Stall()), record("t1", end=0.0, stall=Stall(), gap_s=0.0)):
        page = Page("<title>", figures(gathered(line)), [], Reading(), Simulated("none")).render()
        assert "<title>" in page
        assert "&lt;title&gt;" in page
        assert "t<1>" not in page
        for outside in ("http://", "https://", "src=", "@import", "url(h"):
            assert outside not in page.replace("http://www.w3.org", ""), "it must stand alone"

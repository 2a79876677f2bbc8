"""Prices and decisions, computed by hand: a token costs a millisecond to compute and is ten bytes long."""

import math

import pytest

from impala_vllm.core.cost import CostConfig, StepCost
from impala_vllm.core.first_turns import QUIET_S
from impala_vllm.core.planner import NOTHING, Below, Planner, PlannerConfig, Queue, Way
from impala_vllm.core.retention import SOONEST_S
from impala_vllm.core.types import Outcome, TraceId

BYTES, PREFILL_S = 10.0, 1e-3
HOST, NVME = 100_000.0, 50_000.0
"""Bytes a second: a thousand tokens take 0.1 s from host and 0.2 s from NVMe into host."""
A = TraceId("a")


def planner(host: float = HOST, nvme: float = NVME, **config: object) -> Planner:
    cost = StepCost(CostConfig(prefill_s_per_token=PREFILL_S))
    settings = PlannerConfig(host_bytes_per_s=host, nvme_bytes_per_s=nvme, **config)  # type: ignore[arg-type]
    return Planner(cost, BYTES, settings)


def told(way: Way) -> tuple[int, int, float]:
    return way.host_tokens, way.nvme_tokens, way.seconds


def test_a_load_from_nvme_takes_both_links_and_one_from_host_only_its_own() -> None:
    assert planner().load_s(1000, 0) == pytest.approx(0.1)
    assert planner().load_s(0, 1000) == pytest.approx(0.1 + 0.2)
    assert planner().load_s(2000, 1000) == pytest.approx(0.3 + 0.2)


@pytest.mark.parametrize(
    ("below", "seconds"),
    [
        (NOTHING, 4.0),
        (Below(4000), 0.4),
        (Below(1000), 0.1 + 3.0),
        (Below(0, 1000, 1000), 0.1 + 0.2 + 3.0),
        (Below(1000, 2000, 3000), 0.3 + 0.4 + 1.0),
        (Below(9000, 9000, 9000), 0.4),  # more than is asked for
        (Below(0, 0, 4000), 4.0),  # what NVMe has counts behind host only
    ],
)
def test_what_it_costs_to_have_kv_back(below: Below, seconds: float) -> None:
    assert planner().back_s(4000, below) == pytest.approx(seconds)


def test_kv_that_computes_quicker_than_it_loads_costs_what_computing_does() -> None:
    slow = planner(host=5_000.0, nvme=1_000.0)  # 2 ms and 10 ms a token
    assert slow.back_s(1000, Below(1000)) == pytest.approx(1.0)
    assert slow.back_s(1000, Below(0, 1000, 1000)) == pytest.approx(1.0)
    assert planner(nvme=1_000.0).back_s(1000, Below(400, 600)) == pytest.approx(0.04 + 0.6)


def test_host_is_worth_what_it_saves_over_the_tier_below_a_token_and_a_second_of_waiting() -> None:
    p = planner()
    alone = (1.0 - 0.1) / 1000
    assert p.worth_in_host(1000, Below(1000), 2.0, is_waiting=False) == pytest.approx(alone / 2.0)
    backed = (0.3 - 0.1) / 1000
    assert p.worth_in_host(1000, Below(1000, 0, 1000), 2.0, is_waiting=False) == pytest.approx(backed / 2.0)
    assert p.worth_in_host(1000, Below(1000), 2.0, is_waiting=True) == pytest.approx(alone / SOONEST_S)
    assert p.worth_in_host(1000, Below(1000), 0.0, is_waiting=False) == pytest.approx(alone / SOONEST_S)


@pytest.mark.parametrize("nvme", [NVME, 1_000.0])
def test_nvme_is_worth_the_engine_time_it_saves_however_slow_the_disk_is(nvme: float) -> None:
    p = planner(nvme=nvme)
    assert p.worth_in_nvme(1000, 2.0, is_waiting=False) == pytest.approx(1.0 / 1000 / 2.0)
    assert p.worth_in_nvme(1000, None, is_waiting=True) == pytest.approx(1.0 / 1000 / SOONEST_S)


@pytest.mark.parametrize("wait_s", [None, math.inf])
def test_kv_that_nobody_expects_is_worth_nothing_in_any_tier(wait_s: float | None) -> None:
    assert planner().worth_in_host(1000, Below(1000), wait_s, is_waiting=False) == 0.0
    assert planner().worth_in_nvme(1000, wait_s, is_waiting=False) == 0.0


def test_host_that_is_slower_than_computing_is_worth_nothing_and_not_less() -> None:
    assert planner(host=1_000.0).worth_in_host(1000, Below(1000), 1.0, is_waiting=False) == 0.0
    assert planner().worth_in_host(0, NOTHING, 1.0, is_waiting=False) == 0.0


def test_host_pays_while_it_is_quicker_than_computing() -> None:
    assert planner().host_pays()
    assert not planner(host=5_000.0).host_pays()
    assert planner(host=5_000.0, choose_loads=False).host_pays()


def test_a_turn_loads_what_is_quicker_to_load() -> None:
    # Of 4,000 tokens 500 are in HBM, 1,500 in host and 1,000 behind those on NVMe.
    below = Below(1500, 1000, 0)
    assert told(planner().way(4000, 500, below)) == (1500, 1000, pytest.approx(0.2 + 0.25 + 1.0))
    assert told(planner(nvme=5_000.0).way(4000, 500, below)) == (1500, 0, pytest.approx(0.15 + 2.0))
    assert told(planner(host=5_000.0).way(4000, 500, below)) == (0, 0, pytest.approx(3.5))
    assert told(planner().way(4000, 500, NOTHING)) == (0, 0, pytest.approx(3.5))


def test_while_others_compute_a_load_costs_nothing() -> None:
    # NVMe brings in 2 s what is computed in 1 s; with 2 s of work ahead it is there in time.
    p = planner(nvme=5_000.0)
    below = Below(0, 1000, 1000)
    assert told(p.way(1000, 0, below)) == (0, 0, pytest.approx(1.0))
    assert told(p.way(1000, 0, below, Queue(compute_s=2.5))) == (0, 1000, pytest.approx(2.5))


def test_what_turns_ahead_ask_of_the_disk_is_waited_for() -> None:
    p = planner(nvme=9_000.0)  # 1.1 s to read what takes 1 s to compute
    below, read_s = Below(0, 1000, 1000), 10_000 / 9_000
    assert told(p.way(1000, 0, below, Queue(2.0))) == (0, 1000, pytest.approx(2.0))
    assert told(p.way(1000, 0, below, Queue(2.0, nvme_tokens=1000))) == (0, 1000, pytest.approx(2 * read_s + 0.1))
    assert told(p.way(1000, 0, below, Queue(2.0, nvme_tokens=2000))) == (0, 0, pytest.approx(3.0))


def test_a_disk_that_is_quicker_than_the_engine_is_read_whatever_others_ask_of_it() -> None:
    p, below = planner(), Below(0, 1000, 1000)  # 0.3 s against 1 s
    assert told(p.way(1000, 0, below, Queue(nvme_tokens=4000))) == (0, 1000, pytest.approx(0.8 + 0.2 + 0.1))
    assert p.way(1000, 0, below, Queue(num_reading_behind=9)).nvme_tokens == 1000


def test_what_is_on_a_link_already_is_waited_for_and_not_counted_twice() -> None:
    p = planner()
    below = Below(0, 1000, 1000)
    p.nvme.queued_bytes = 15_000
    assert p.way(1000, 0, below).seconds == pytest.approx(0.3 + 0.2 + 0.1)
    assert p.way(1000, 0, below, Queue(nvme_tokens=2000)).seconds == pytest.approx(0.4 + 0.2 + 0.1)
    p.host.queued_bytes = 20_000
    assert p.way(1000, 0, below).seconds == pytest.approx(0.3 + 0.2 + 0.2 + 0.1)
    assert p.way(1000, 0, Below(1000)).seconds == pytest.approx(0.2 + 0.1)


def test_of_two_ways_as_quick_the_one_that_computes_less_is_taken() -> None:
    way = planner().way(1000, 0, Below(400, 600, 1000), Queue(compute_s=9.0))
    assert (way.host_tokens, way.nvme_tokens) == (400, 600)


def test_without_a_choice_everything_is_loaded() -> None:
    way = planner(host=1.0, nvme=1.0, choose_loads=False).way(1000, 0, Below(400, 600, 1000))
    assert (way.host_tokens, way.nvme_tokens) == (400, 600)


def test_a_second_turns_kv_is_written_and_a_first_ones_where_a_second_is_likely() -> None:
    p = planner()
    for _ in range(20):
        p.ended(1, "one-shots", Outcome.STOP, True, 0.0)
        p.ended(1, "agents", Outcome.TOOL_CALL, True, 0.0)
    assert p.writes(1, "agents") is True
    assert p.writes(1, "one-shots") is False
    assert p.writes(2, "one-shots") is True
    assert planner(gate_writes=False).writes(1, "one-shots") is True


def test_of_a_kind_that_has_shown_nothing_yet_only_a_tool_call_or_a_second_turn_is_written() -> None:
    p = planner()
    assert p.writes(1, "new") is None  # of a thousand that arrive at once, none has ended yet
    assert not p.ended(1, "new", Outcome.STOP, False, 0.0)
    assert p.ended(1, "new", Outcome.TOOL_CALL, False, 0.0)
    assert p.writes(1, "new") is None
    assert p.writes(2, "new") is True
    assert p.ended(1, "new", Outcome.TOOL_CALL, False, 0.0)
    assert p.writes(1, "new") is True


def test_a_turn_that_ends_with_a_tool_call_is_written_whatever_its_kind() -> None:
    p = planner()
    assert p.ended(1, "one-shots", Outcome.TOOL_CALL, False, 0.0)
    assert not p.ended(1, "one-shots", Outcome.STOP, False, 0.0)
    assert p.ended(1, "one-shots", Outcome.STOP, True, 0.0), "it has been written as it was computed"
    assert planner(gate_writes=False).ended(1, "one-shots", Outcome.STOP, False, 0.0)


@pytest.mark.parametrize("outcome", [Outcome.ABORT, Outcome.ERROR, Outcome.LENGTH])
def test_a_turn_that_was_cut_off_says_nothing_of_its_kind(outcome: Outcome) -> None:
    p = planner()
    for _ in range(50):
        p.ended(1, "kind", outcome, False, 0.0)
    assert p.writes(1, "kind") is None


def test_a_kind_whose_traces_come_back_after_a_plain_answer_is_written_again() -> None:
    p = planner()
    for _ in range(20):
        p.ended(1, "chats", Outcome.STOP, True, 0.0)
        p.resumed("chats", Outcome.STOP)
        p.ended(1, "one-shots", Outcome.STOP, True, 0.0)
        p.resumed("one-shots", Outcome.TOOL_CALL)  # counted as such already
    assert p.writes(1, "chats")
    assert not p.writes(1, "one-shots")


def test_chats_that_one_in_five_goes_on_with_are_written_and_those_that_one_in_fifty_does_are_not() -> None:
    p = planner()
    for number in range(100):
        p.ended(1, "chats", Outcome.STOP, False, 0.0)
        p.ended(1, "questions", Outcome.STOP, False, 0.0)
        if number % 5 == 0:
            p.resumed("chats", Outcome.STOP)
        if number % 50 == 0:
            p.resumed("questions", Outcome.STOP)
    assert p.writes(1, "chats") is True
    assert p.writes(1, "questions") is False


def test_a_turn_of_an_unknown_kind_that_does_not_say_how_it_ended_is_written_until_silence_tells() -> None:
    p = planner()
    for _ in range(3):
        assert p.ended(1, "stop strings", Outcome.UNKNOWN, False, 0.0)
        assert not p.ended(1, "cut off", Outcome.LENGTH, False, 0.0)
    assert not p.ended(1, "stop strings", Outcome.UNKNOWN, False, QUIET_S)
    assert p.writes(1, "stop strings") is False
    assert p.writes(1, "cut off") is False


@pytest.mark.parametrize("outcome", [Outcome.UNKNOWN, Outcome.LENGTH])
def test_a_kind_that_never_says_how_it_ends_is_known_by_who_comes_back(outcome: Outcome) -> None:
    p = planner()
    for _ in range(10):
        p.ended(1, "chats", outcome, False, 0.0)
    p.resumed("chats", outcome)
    p.resumed("chats", outcome)
    assert p.ended(1, "chats", outcome, False, QUIET_S)
    assert p.writes(1, "chats") is True


def test_a_turn_that_keeps_others_from_the_engine_loads_though_computing_were_quicker_for_itself() -> None:
    p = planner(nvme=5_000.0)  # 2 s to read what takes 1 s to compute
    below = Below(0, 1000, 1000)
    assert p.way(1000, 0, below, Queue(num_behind=1)).nvme_tokens == 0, "1 s each, against 2.1 s for itself alone"
    assert told(p.way(1000, 0, below, Queue(num_behind=2))) == (0, 1000, pytest.approx(2.0 + 0.1))


def test_a_turn_that_keeps_others_from_the_disk_computes_though_loading_were_quicker_for_itself() -> None:
    p = planner(nvme=9_000.0)  # 1.1 s to read, 0.1 s to load, 1 s to compute
    below = Below(0, 1000, 1000)
    assert p.way(1000, 0, below, Queue(2.0)).nvme_tokens == 1000
    assert told(p.way(1000, 0, below, Queue(2.0, num_reading_behind=1))) == (0, 0, pytest.approx(3.0))
    assert p.way(1000, 0, below, Queue(2.0, num_behind=1, num_reading_behind=1)).nvme_tokens == 1000


def test_what_is_on_its_way_already_costs_the_disk_nothing_more() -> None:
    p = planner(nvme=5_000.0)
    below = Below(0, 1000, 1000)
    p.nvme.queued_bytes = 1_000  # the last tenth of it
    assert p.way(1000, 0, below).nvme_tokens == 0
    assert told(p.way(1000, 0, below, Queue(coming_tokens=1000))) == (0, 1000, pytest.approx(0.2 + 0.1))

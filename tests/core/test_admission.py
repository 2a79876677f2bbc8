"""Rank and admission on schedules small enough to know the best order."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from impala_vllm.core.admission import Admission, AdmissionConfig, Asking
from impala_vllm.core.cost import CostConfig, StepCost
from impala_vllm.core.rank import RankConfig, Waiting, key
from impala_vllm.core.types import RequestId, TraceId

COST = StepCost(CostConfig(prefill_s_per_token=1e-3, decode_s_per_step=0.01))


def turn(name: str, prompt: int, reach: int = 0, arrived_s: float = 0.0, **more: object) -> Waiting:
    return Waiting(RequestId(name), TraceId(name), arrived_s, prompt, reach, 10.0, **more)  # type: ignore[arg-type]


def order(turns: list[Waiting], now: float = 0.0) -> list[str]:
    return [t.request_id for t in sorted(turns, key=lambda t: key(t, COST, RankConfig(), now))]


def test_a_long_prompt_in_reach_goes_before_a_shorter_one_that_is_not() -> None:
    assert order([turn("cold", 2000), turn("warm", 50_000, reach=49_900)]) == ["warm", "cold"]


def test_the_clients_priority_is_the_major_key() -> None:
    assert order([turn("short", 10, priority=1), turn("long", 9000, priority=0)]) == ["long", "short"]


def test_neither_a_long_wait_nor_a_preemption_makes_a_turn_urgent() -> None:
    turns = [
        turn("batch", 10, arrived_s=0.0, priority=1),
        turn("pushed out", 10, arrived_s=0.0, priority=1, preempted=True),
        turn("urgent", 100_000, arrived_s=999.0, priority=0),
    ]
    assert order(turns, now=1000.0) == ["urgent", "pushed out", "batch"]


def test_a_turn_past_its_bound_waits_for_an_urgent_one_that_finds_no_room() -> None:
    asks = [ask("urgent", 80, priority=0), ask("late", 10, arrived_s=-300.0, priority=1)]
    assert admitted(1.0, asks, free=100, running=1) == []


def test_a_preempted_turn_is_never_overtaken() -> None:
    assert order([turn("short", 10), turn("back", 9000, preempted=True)]) == ["back", "short"]


def test_a_turn_past_its_bound_goes_before_every_younger_one() -> None:
    turns = [turn("long", 100_000, arrived_s=0.0), turn("short", 10, arrived_s=299.0)]
    assert order(turns, now=299.5) == ["short", "long"]
    assert order(turns, now=300.0) == ["long", "short"]


ADMISSION = Admission(COST, 300.0, AdmissionConfig(patience=7.0))
IDLE_BLOCKS, IDLE_TOKENS = 60, 1000


def ask(name: str, new: int, own: int = 0, arrived_s: float = 0.0, **more: int) -> Asking:
    return Asking(turn(name, 1000, arrived_s=arrived_s, **more), new, own)


def admitted(wait_s: float, asks: list[Asking], free: int, running: int, **more: Any) -> list[str]:
    """Who is admitted beside idle KV whose trace is expected back after `wait_s`."""
    kept = IDLE_BLOCKS if ADMISSION.keeps(IDLE_TOKENS, wait_s) else 0
    plan = ADMISSION.plan(asks, kept, free, running, 0.0, **more)
    assert plan.num_held == len(asks) - len(plan.admitted)
    return [a.turn.request_id for a in plan.admitted]


def test_kv_that_is_soon_wanted_keeps_its_room() -> None:
    assert admitted(1.0, [ask("a", 50)], free=100, running=1) == []
    assert admitted(1.0, [ask("a", 40)], free=100, running=1) == ["a"]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 1)), max_size=12),
    st.integers(0, 30),
    st.integers(0, 30),
)
def test_a_plan_is_what_trying_every_turn_in_turn_gives(asks: list[tuple[int, int, int]], free: int, kept: int) -> None:
    asks.sort(key=lambda a: a[2])
    asking = [ask(str(n), new, own, priority=priority) for n, (new, own, priority) in enumerate(asks)]
    room, expected, held = free - kept, [], set[int]()
    for one in asking:
        first_held = min(held, default=one.turn.priority)
        if one.new_blocks + one.own_idle_blocks <= room and one.turn.priority <= first_held:
            expected.append(one)
            room -= one.new_blocks + one.own_idle_blocks
        else:
            held.add(one.turn.priority)
    assert ADMISSION.plan(asking, kept, free, 1, 0.0).admitted == expected


def test_kv_with_a_long_gap_ahead_does_not_hold_anybody() -> None:
    assert admitted(100.0, [ask("a", 50)], free=100, running=1) == ["a"]


def test_a_smaller_turn_passes_a_blocked_head() -> None:
    assert admitted(1.0, [ask("big", 80), ask("small", 30)], free=100, running=1) == ["small"]


def test_an_idle_engine_holds_nobody() -> None:
    assert admitted(1.0, [ask("a", 80), ask("b", 90)], free=100, running=0) == ["a"]


def test_an_idle_engine_is_not_kept_idle_by_turns_that_cannot_begin() -> None:
    asks = [ask("no adapter", 80), ask("able", 90), ask("as able", 90)]
    assert admitted(1.0, asks, free=100, running=0, skipped={"no adapter"}) == ["able"]
    asks = [ask("no adapter", 10), ask("able", 90)]
    assert admitted(1.0, asks, free=100, running=0, skipped={"no adapter"}) == ["no adapter", "able"]
    assert admitted(1.0, asks, free=100, running=0, skipped={"no adapter", "able"}) == ["no adapter", "able"]


def test_nobody_is_held_past_the_bound() -> None:
    late = ask("late", 90, arrived_s=-300.0)
    assert admitted(1.0, [late], free=100, running=1) == ["late"]


def test_what_a_turn_finds_of_its_own_is_not_counted_as_room_for_others() -> None:
    asks = [ask("warm", 2, own=38), ask("cold", 10)]
    assert admitted(1.0, asks, free=100, running=1) == ["warm"]


def test_a_turn_held_back_is_not_passed_by_what_the_client_calls_less_urgent() -> None:
    asks = [ask("urgent", 80, priority=0), ask("as urgent", 10, priority=0), ask("can wait", 10, priority=1)]
    assert admitted(1.0, asks, free=100, running=1) == ["as urgent"]


def test_the_order_of_two_turns_does_not_change_while_they_wait() -> None:
    turns = [turn("longer", 1000, arrived_s=0.0), turn("shorter", 990, arrived_s=10.0)]
    assert order(turns, now=10.0) == order(turns, now=250.0) == ["longer", "shorter"]


def test_kv_that_is_cheap_to_get_back_keeps_its_room_for_a_shorter_wait() -> None:
    # A thousand tokens take a second to compute; patience is seven times that, or seven times the load.
    assert ADMISSION.keeps(IDLE_TOKENS, 6.0)
    assert not ADMISSION.keeps(IDLE_TOKENS, 6.0, back_s=0.1)
    assert ADMISSION.keeps(IDLE_TOKENS, 0.6, back_s=0.1)
    assert not ADMISSION.keeps(IDLE_TOKENS, None, back_s=0.1)
    assert not ADMISSION.keeps(IDLE_TOKENS, 0.0, back_s=0.0)


def test_time_to_load_what_is_in_reach_counts_as_work() -> None:
    near, far = turn("near", 2000, reach=1900), turn("far", 2000, reach=1900, load_s=1.0)
    assert order([far, near]) == ["near", "far"]
    assert order([far, turn("cold", 2000)]) == ["far", "cold"]  # 1.0 s of loading, 1.9 s less to compute

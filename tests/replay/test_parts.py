"""Plans made of parts keep what is inside a part, and results find their part again."""

from impala_vllm.replay import parts
from impala_vllm.replay.load import Run, TurnResult
from impala_vllm.replay.synthetic import fan_out, head_of_line, independent
from impala_vllm.replay.vocabulary import Vocabulary


def test_a_part_keeps_its_families_under_its_name(vocabulary: Vocabulary) -> None:
    plan = parts.combine({"a": fan_out(vocabulary, num_forks=2), "b": fan_out(vocabulary, num_forks=2)})
    assert [s.session_id for s in plan.roots()] == ["a/parent0", "b/parent0"]
    children = [s for s in plan.sessions if s.parent_id == "b/parent0"]
    assert set(plan.roots()[1].turns[1].joins) == {s.session_id for s in children}
    requests = [t.request_id for _, _, t in plan.turns()]
    assert len(set(requests)) == len(requests)


def test_tasks_are_spread_in_order_over_their_time(vocabulary: Vocabulary) -> None:
    plan = parts.spread(independent(vocabulary, [(8, 2)] * 4), begin_s=60.0, over_s=20.0)
    assert [s.arrival_s for s in plan.sessions] == [60.0, 65.0, 70.0, 75.0]


def test_a_parts_run_is_its_own_results_and_time() -> None:
    def turn(session: str, start: float, end: float) -> TurnResult:
        return TurnResult(session, None, 0, session, session, start, start, end, 0.0, 1, 1, 0, None)

    run = Run((turn("short/a", 5.0, 6.0), turn("shorter/a", 0.0, 9.0), turn("short/b", 6.0, 8.0)), 9.0)
    part = parts.only(run, "short")
    assert [r.session_id for r in part.results] == ["short/a", "short/b"]
    assert part.makespan_s == 3.0


def test_short_turns_run_alone_first_and_then_behind_the_long_one(vocabulary: Vocabulary) -> None:
    plan = head_of_line(vocabulary, num_short=3, spacing_s=1.0, pause_s=10.0)
    arrivals = {s.session_id: s.arrival_s for s in plan.sessions}
    assert arrivals["short-alone/single2"] == 2.0
    assert arrivals["long/single0"] == 13.0
    assert [arrivals[f"short-beside-long/single{i}"] for i in range(3)] == [14.0, 15.0, 16.0]
    (long,) = (s for s in plan.sessions if s.session_id.startswith("long/"))
    assert len(long.turns[0].output) == 1500
    # Nothing is shared, or the second half would find the first one's prompts.
    assert len({s.turns[0].prompt[:16] for s in plan.sessions}) == 7

"""Sessions of a log that names none, by the engine's own identity."""

from dataclasses import replace

from impala_vllm.sim.question import Asked, ask
from impala_vllm.sim.recognised import recognise
from tests.sim.scenes import TIMING
from tests.sim.test_recorded import turn


def nameless(name, arrival_s, blocks, **more):
    """All from one clock, as a proxy writes them."""
    return turn(name, arrival_s, blocks, trace_id=None, recording="log", **more)


def two_agents():
    """Their turns alternate; each prompt goes on where the one before ended."""
    return [
        nameless(f"{'ab'[i % 2]}{i // 2}", 5.0 * i, range(100 * (i % 2), 100 * (i % 2) + 10 * (i // 2 + 1)))
        for i in range(6)
    ]


def test_a_log_that_names_its_sessions_stays_as_it_is():
    turns = [turn("a0", 0.0, [1]), turn("b0", 1.0, [2])]
    found = recognise(turns)
    assert found.turns is turns
    assert (found.num_requests, found.num_sessions) == (0, 0)


def test_turns_that_go_on_with_a_prompt_are_one_session():
    found = recognise(two_agents())
    by_name = {t.request_id: t.trace_id for t in found.turns}
    assert by_name["a0"] == by_name["a1"] == by_name["a2"] != by_name["b0"] == by_name["b1"] == by_name["b2"]
    assert (found.num_requests, found.num_sessions) == (6, 2)


def test_requests_that_share_nothing_are_sessions_of_their_own():
    found = recognise([nameless(f"r{i}", float(i), [10 * i, 10 * i + 1]) for i in range(5)])
    assert len({t.trace_id for t in found.turns}) == found.num_sessions == 5


def test_ids_that_clients_sent_count_and_are_not_called_recognised():
    sent = [nameless(f"s{i}", 5.0 * i, [10 * i], session_id="mine") for i in range(3)]
    found = recognise(sent)
    assert len({t.trace_id for t in found.turns}) == 1
    assert found.num_requests == 0


def test_named_turns_keep_their_names_beside_recognised_ones():
    found = recognise([turn("a0", 0.0, [1]), nameless("b0", 1.0, [2])])
    assert [t.trace_id for t in found.turns] == ["a", "recognised/t1"]


def test_what_was_recognised_is_served_as_sessions_and_said():
    question = ask(two_agents(), Asked(TIMING))
    assert sorted(len(s.turns) for s in question.workload.sessions) == [3, 3]
    about = question.describe_workload()
    assert (about["unnamed_requests"], about["recognised_sessions"], about["tasks"]) == (6, 2, 2)
    assert any("recognised as those of 2 sessions" in line for line in question.assumptions)


def test_time_without_an_end_is_the_tools_and_that_is_said():
    endless = ask(two_agents(), Asked(TIMING)).assumptions
    assert any(line.startswith("4 turns without an end") for line in endless)
    ended = ask([replace(t, finish_s=t.arrival_s + 1) for t in two_agents()], Asked(TIMING)).assumptions
    assert not any("without an end" in line for line in ended)

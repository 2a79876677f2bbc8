"""Who is asked when: gaps, children, joins, and how many at a time."""

from dataclasses import replace

from tests.sim.scenes import Scene, session, workload


def family():
    """A parent whose second turn joins a child that its first one launched."""
    parent = session("p", [4, 8], output=1, gap_s=2.0)
    second = replace(parent.turns[1], joins=("c",))
    parent = replace(parent, turns=(parent.turns[0], second))
    child = replace(session("c", [4, 8], output=1, gap_s=5.0), parent_id="p", after_turn=0, start_gap_s=1.0)
    return workload(parent, child)


def test_a_gap_begins_at_the_end_of_the_turn_before():
    scene = Scene(workload(session("a", [4, 8], output=1, gap_s=10.0))).play()
    first, second = scene.client.served
    assert (second.start_s, second.tools_s) == (first.end_s + 10.0, 10.0)


def test_a_turn_that_joins_waits_for_its_child_and_of_that_only_tool_time_is_not_stall():
    scene = Scene(family()).play()
    by = {(s.session_id, s.index): s for s in scene.client.served}
    assert by["c", 0].start_s == by["p", 0].end_s + 1.0
    assert by["p", 1].start_s == by["c", 1].end_s + 2.0
    assert by["p", 1].tools_s == 2.0 + 5.0 + 1.0
    assert {s.root_id for s in scene.client.served} == {"p"}


def test_a_child_of_no_turn_starts_with_its_parent():
    load = family()
    child = replace(load.sessions[1], after_turn=-1)
    scene = Scene(replace(load, sessions=(load.sessions[0], child))).play()
    by = {(s.session_id, s.index): s for s in scene.client.served}
    assert by["c", 0].start_s == 1.0


def test_so_many_tasks_are_live_at_a_time_and_a_task_ends_with_its_last_child():
    load = family()
    straggler = replace(load.sessions[1], start_gap_s=100.0)
    parent = replace(load.sessions[0], turns=tuple(replace(t, joins=()) for t in load.sessions[0].turns))
    load = workload(parent, straggler, session("x", [4], output=1), session("y", [4], output=1))
    scene = Scene(load)
    scene.client.keep_live(load.roots(), 2, [0.0, 0.0])
    scene.loop.run()
    by = {(s.session_id, s.index): s for s in scene.client.served}
    assert by["y", 0].start_s == by["x", 0].end_s
    assert by["y", 0].start_s < by["c", 1].end_s
    assert len(scene.client.served) == load.num_turns()


def test_names_of_requests_say_nothing_of_their_session():
    seen: list[str] = []
    scene = Scene(workload(session("alice", [4, 8])))
    arrive = scene.replica.arrive
    scene.client._send = lambda r: (seen.append(r.request_id), arrive(r))
    scene.play()
    assert len(set(seen)) == 2
    assert not any("alice" in name for name in seen)

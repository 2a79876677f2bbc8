"""Figures of a run, by hand."""

from dataclasses import replace

import pytest

from impala_vllm.sim.measures import measure, quantile, tasks
from tests.sim.scenes import Scene, session, with_gaps, workload
from tests.sim.test_client import family


def test_stall_is_what_is_left_of_jct_without_tool_time():
    scene = Scene(workload(session("a", [4, 8], output=1, gap_s=10.0))).play()
    (task,) = tasks(scene.client.served)
    # 1 s a step and 0.5 s a token; the second turn finds one block of its two.
    assert (task.jct_s, task.gaps_s, task.stall_s) == (3.0 + 10.0 + 3.0, 10.0, 6.0)


def test_a_joined_childs_tool_time_is_no_stall_and_its_service_is():
    (task,) = tasks(Scene(family()).play().client.served)
    # Four turns of 3 s each one after the other; 1 + 5 + 2 s of tools.
    assert (task.gaps_s, task.stall_s) == (8.0, 12.0)


@pytest.mark.parametrize(
    ("child_gap_s", "gaps_s", "stall_s"), [(5.0, 20.0 + 2.0, 9.0), (30.0, 20.0 + 11.0 + 2.0, 12.0)]
)
def test_of_a_childs_tool_time_only_what_its_parent_waited_through_counts(child_gap_s, gaps_s, stall_s):
    parent = with_gaps(session("p", [4, 8, 12], output=1), 20.0, 2.0)
    parent = replace(parent, turns=(*parent.turns[:2], replace(parent.turns[2], joins=("c",))))
    child = replace(session("c", [4, 8], output=1, gap_s=child_gap_s), parent_id="p", after_turn=0, start_gap_s=1.0)
    (task,) = tasks(Scene(workload(parent, child)).play().client.served)
    # Turns of 3 s: the parent's at 0 and 23, then it waits from 26 on; the child's at 4, and at 12 or 37.
    assert (task.gaps_s, task.stall_s) == (gaps_s, stall_s)


def test_the_tools_of_a_child_that_outlives_its_parent_are_no_stall():
    parent = session("p", [4, 8], output=1, gap_s=2.0)
    child = replace(session("c", [4, 8], output=1, gap_s=5.0), parent_id="p", after_turn=0, start_gap_s=10.0)
    (task,) = tasks(Scene(workload(parent, child)).play().client.served)
    # The parent ends at 8; the child's turns are at 13 and 21.
    assert (task.jct_s, task.gaps_s, task.stall_s) == (24.0, 15.0, 9.0)


def test_the_figures_are_those_of_the_contract():
    scene = Scene(workload(session("a", [4, 8], output=1), session("b", [4], output=1))).play(0.0, 100.0)
    found = measure(scene.client.served, recomputed_tokens=5, bytes_moved=7)
    assert found.makespan_s == 103.0
    assert found.tasks_per_hour == pytest.approx(2 * 3600 / 103.0)
    assert found.stall_mean_s == (6.0 + 3.0) / 2
    assert found.hit_ratio == 4 / 16
    assert (found.recomputed_tokens, found.bytes_moved, found.max_hold_s) == (5, 7, 0.0)
    assert found.resume_ttft_p50_s == 3.0


def test_without_a_second_turn_nothing_resumes():
    found = measure(Scene(workload(session("a", [4]))).play().client.served, 0)
    assert found.resume_ttft_p50_s is None


def test_quantiles_lie_between_order_statistics():
    assert [quantile([3.0, 1.0, 2.0], q) for q in (0.0, 0.25, 0.5, 1.0)] == [1.0, 1.5, 2.0, 3.0]

"""Logs as workloads: blocks, outputs, gaps, children."""

from dataclasses import replace

import pytest

from impala_vllm.core.types import Outcome
from impala_vllm.sim import recorded
from impala_vllm.workload import Turn, WorkloadError


def turn(name, arrival_s, blocks, output_tokens=4, finish_s=None, tail=0, **more):
    trace = name.rstrip("0123456789")
    return Turn(
        name, arrival_s, finish_s, tuple(blocks), 4, 4 * len(blocks) + tail, output_tokens,
        recording=more.pop("recording", trace), trace_id=more.pop("trace_id", trace), **more,
    )  # fmt: skip


def of(*turns, merge=1):
    return recorded.workload(list(turns), merge)[0]


def test_a_turns_output_fills_the_blocks_that_the_next_prompt_has():
    load = of(turn("a0", 0.0, [1, 2], finish_s=2.0), turn("a1", 5.0, [1, 2, 3, 4]))
    first, second = load.sessions[0].turns
    assert first.keys == (1, 2, 3)
    assert (second.gap_s, first.next_gap_s, second.next_gap_s) == (3.0, 3.0, None)


def test_an_output_that_later_prompts_dropped_fills_blocks_of_nobody():
    load = of(turn("a0", 0.0, [1, 2], output_tokens=8), turn("a1", 5.0, [1, 2, 3]))
    *_, third, fourth = load.sessions[0].turns[0].keys
    assert third < 0
    assert fourth < 0
    assert third != fourth


def test_a_block_that_was_asked_for_before_holds_no_new_output():
    other = turn("b0", 0.0, [1, 2, 3])
    load = of(other, turn("a0", 1.0, [1, 2]), turn("a1", 5.0, [1, 2, 3, 4]))
    first = load.sessions[1].turns[0]
    assert first.keys[:2] == (1, 2)
    assert first.keys[2] < 0


def test_recorded_output_blocks_are_taken_as_they_are():
    load = of(turn("a0", 0.0, [1], output_tokens=8, output_blocks=(7, 8)))
    assert load.sessions[0].turns[0].keys == (1, 7, 8)


def test_merged_blocks_go_by_the_key_of_their_last_one():
    load = of(turn("a0", 0.0, [1, 2, 3, 4, 5], output_tokens=1), merge=2)
    assert load.block_size == 8
    assert load.sessions[0].turns[0].keys == (2, 4)


def test_long_prompts_are_merged_by_default():
    load, _ = recorded.workload([turn("a0", 0.0, range(1, 1025))])
    assert load.block_size == 16
    assert len(load.sessions[0].turns[0].keys) == 256


def test_a_child_hangs_below_the_turn_it_followed_and_is_joined_by_the_one_that_waited():
    load = of(
        turn("p0", 0.0, [1], finish_s=1.0),
        turn("p1", 10.0, [1, 2], finish_s=11.0),
        turn("c0", 2.0, [8], finish_s=3.0, recording="p", parent_trace_id="p"),
        turn("c1", 4.0, [8, 9], finish_s=6.0, recording="p", parent_trace_id="p"),
    )
    parent, child = load.sessions
    assert (child.parent_id, child.after_turn, child.start_gap_s) == ("p", 0, 1.0)
    assert (parent.turns[1].joins, parent.turns[1].gap_s) == (("c",), 4.0)
    assert parent.turns[0].next_gap_s == 4.0 + 1.0 + 1.0
    assert not load.has_one_clock


def test_traces_that_name_each_other_parent_become_roots_somewhere():
    load = of(
        turn("a0", 0.0, [1], finish_s=1.0, parent_trace_id="b"),
        turn("b0", 0.5, [2], finish_s=1.0, parent_trace_id="a"),
        turn("b1", 9.0, [2, 3], parent_trace_id="a"),
    )
    assert load.roots()
    assert {s.session_id for s in load.only(load.roots()).sessions} == {"a", "b"}


def test_sessions_of_one_recording_share_its_clock():
    assert of(turn("a0", 0.0, [1], recording="log"), turn("b0", 3.0, [2], recording="log")).has_one_clock


def test_an_output_of_unknown_length_is_the_median_of_those_that_are_known():
    turns = [turn("a0", 0.0, [1], output_tokens=6), turn("b0", 1.0, [2], output_tokens=None)]
    load, assumed = recorded.workload(turns, 1)
    assert (assumed.output_tokens, assumed.num_outputs) == (6, 1)
    assert load.sessions[1].turns[0].output_tokens == 6
    assert recorded.workload([turns[1]], 1)[1].output_tokens == recorded.UNKNOWN_OUTPUT_TOKENS


def test_the_rest_of_a_turn_comes_along():
    load = of(turn("a0", 0.0, [1], tail=3, outcome=Outcome.TOOL_CALL, tool="Bash", model="m"))
    (found,) = load.turns()
    assert (found.prompt_tokens, found.outcome, found.tool, found.namespace.model) == (
        7,
        Outcome.TOOL_CALL,
        "Bash",
        "m",
    )


def test_nothing_and_mixed_block_sizes_are_refused_in_one_line():
    with pytest.raises(WorkloadError, match="no request"):
        recorded.workload([])
    one = turn("a0", 0.0, [1])
    with pytest.raises(WorkloadError, match="block sizes 4, 8"):
        recorded.workload([one, replace(one, block_size=8)])

"""One engine, step by step, against times computed by hand: 1 s a step, 0.5 s a prompt token, 0.25 s a decode."""

import pytest
from msgspec import structs

from impala_vllm.sim.policy import Policy
from tests.sim.scenes import TIMING, Scene, session, workload


class EveryStep(Policy):
    """Stock without leaps."""

    def __init__(self, replica):
        super().__init__(replica)
        replica._num_alike = lambda scheduled, prompts, step_s: None


def test_a_request_takes_a_prefill_and_a_decode_a_token():
    scene = Scene(workload(session("a", [8], output=3))).play()
    (served,) = scene.client.served
    assert served.first_s == 1.0 + 8 * 0.5
    assert served.end_s == 5.0 + 2 * 1.25
    assert scene.replica.computed_tokens == 8


def test_a_long_prompt_is_computed_in_chunks():
    scene = Scene(workload(session("a", [100], output=1))).play()
    assert scene.ends() == {("a", 0): 2 * 1.0 + 100 * 0.5}


def test_two_that_decode_share_a_step():
    scene = Scene(workload(session("a", [4], output=4), session("b", [4], output=4))).play()
    assert set(scene.ends().values()) == {1.0 + 8 * 0.5 + 3 * (1.0 + 2 * 0.25)}


def test_an_arrival_waits_for_the_step_that_runs_not_for_the_leap():
    load = workload(session("a", [4], output=20), session("b", [4], output=1))
    scene = Scene(load).play(0.0, 3.5)
    # a: prefill until 3.0, decodes of 1.25 s; the step that runs at 3.5 ends at 4.25; then b's prefill with a's decode.
    assert scene.ends()["b", 0] == 4.25 + 1.0 + 4 * 0.5 + 0.25


@pytest.mark.parametrize("num_blocks", [8, 12, 40])
def test_leaps_change_nothing_but_the_time_it_takes(num_blocks):
    timing = structs.replace(TIMING, decode_s_per_context=0.01, prefill_s_per_token_and_context=0.001)
    load = workload(*(session(n, [5 + i, 14 + i], output=5 + 3 * i, gap_s=1.0 + i) for i, n in enumerate("abcd")))
    starts = (0.0, 0.3, 2.9, 7.1)
    leaping = Scene(load, num_blocks, timing=timing).play(*starts)
    stepping = Scene(load, num_blocks, policy=EveryStep, timing=timing).play(*starts)
    assert leaping.ends() == pytest.approx(stepping.ends())
    assert leaping.replica.recomputed_tokens == stepping.replica.recomputed_tokens
    assert leaping.replica.num_preemptions == stepping.replica.num_preemptions


@pytest.mark.parametrize("num_blocks", [140, 160, 400])
def test_leaps_over_the_chunks_of_long_prompts_change_nothing_but_the_time_it_takes(num_blocks):
    timing = structs.replace(TIMING, decode_s_per_context=0.01, prefill_s_per_token_and_context=0.001)
    load = workload(
        session("a", [400, 450], output=30), session("b", [300, 380], output=9), session("c", [20, 30, 500], output=40)
    )
    starts = (0.0, 50.5, 0.3)
    leaping = Scene(load, num_blocks, timing=timing)
    steps = []
    leaping.replica.on_step = steps.append
    leaping.play(*starts)
    stepping = Scene(load, num_blocks, policy=EveryStep, timing=timing).play(*starts)
    assert leaping.ends() == pytest.approx(stepping.ends())
    assert leaping.replica.busy_s == pytest.approx(stepping.replica.busy_s)
    for count in ("recomputed_tokens", "computed_tokens", "num_preemptions"):
        assert getattr(leaping.replica, count) == getattr(stepping.replica, count)
    assert max(s.prompt_tokens for s in steps) > 3 * timing.max_num_batched_tokens
    assert sum(s.end_s - s.start_s for s in steps) == pytest.approx(leaping.replica.busy_s)


def test_an_arrival_cuts_a_leap_over_chunks_at_the_step_that_runs():
    load = workload(session("a", [640], output=1), session("b", [4], output=1))
    scene = Scene(load, num_blocks=200).play(0.0, 40.0)
    # a's ten chunks of 64 take 33 s each; b is placed when the last one is over.
    assert scene.ends()["a", 0] == 330.0
    assert scene.ends()["b", 0] == 330.0 + 1.0 + 4 * 0.5


def test_a_second_turn_finds_its_full_blocks_but_computes_its_last_token():
    scene = Scene(workload(session("a", [8, 16], output=4))).play()
    first, second = scene.client.served
    assert (first.cached_tokens, second.cached_tokens) == (0, 8)  # the block its output ended was not full when it did
    assert scene.replica.computed_tokens == 8 + 8
    assert scene.replica.recomputed_tokens == 0


def test_a_prompt_that_is_all_there_still_computes_its_last_block():
    load = workload(session("a", [8], output=1, stem=8), session("b", [8], output=1, stem=8))
    scene = Scene(load).play(0.0, 50.0)
    assert scene.client.served[1].cached_tokens == 4


def test_what_was_evicted_is_computed_again_and_counted():
    load = workload(session("a", [16, 20], output=1, gap_s=30.0), session("b", [20], output=1))
    scene = Scene(load, num_blocks=6).play(0.0, 12.0)
    again = scene.client.served[-1]
    assert (again.session_id, again.cached_tokens) == ("a", 4)
    assert scene.replica.recomputed_tokens == 12


def test_the_last_to_run_gives_way_when_blocks_run_out_and_comes_back_first():
    load = workload(session("a", [8], output=16), session("b", [8], output=16), session("c", [8], output=1))
    scene = Scene(load, num_blocks=8, max_num_seqs=2).play()
    assert scene.replica.num_preemptions == 1
    # c waits for a seat; when b loses its own, b stands before c, and there is no room until a is done.
    (c,) = (s for s in scene.client.served if s.session_id == "c")
    assert scene.ends()["a", 0] < c.first_s
    assert scene.replica.computed_tokens == 8 + 8 + 8  # what b had computed was still there


def test_a_prompt_is_placed_only_where_all_of_it_fits():
    load = workload(session("a", [20], output=8), session("b", [16], output=1))
    scene = Scene(load, num_blocks=8).play()
    assert scene.client.served[1].first_s > scene.ends()["a", 0]
    assert scene.replica.num_preemptions == 0


def test_no_more_run_than_there_are_seats():
    load = workload(*(session(n, [4], output=10) for n in "abc"))
    scene = Scene(load, max_num_seqs=2).play()
    assert scene.order() == ["a", "b", "c"]
    assert scene.client.served[2].first_s > min(scene.ends().values())


def test_a_policy_that_holds_says_for_how_long():
    class OneAtATime(Policy):
        def plan(self, now):
            waiting = list(self.replica.waiting)
            placed = [] if self.replica.running else waiting[:1]
            self.held = waiting[len(placed) :]
            return placed

    scene = Scene(workload(session("a", [4], output=1), session("b", [4], output=1)), policy=OneAtATime).play()
    assert [s.held_s for s in scene.client.served] == [0.0, 3.0]

"""What is asked becomes a workload and a set-up, and every assumption is said."""

from dataclasses import replace

import pytest
from msgspec import structs

from impala_vllm.config import ConfigError
from impala_vllm.sim.question import Asked, ask, most_live
from tests.sim.scenes import TIMING, session, workload
from tests.sim.test_recorded import turn


def log(count=6, tokens=40):
    """Sessions of `tokens` and then `2 * tokens` of their own, each with its own clock."""
    return [
        turn(f"s{'abcdefghij'[i]}{t}", 10.0 * t, range(100 * i, 100 * i + (t + 1) * tokens // 4), finish_s=10.0 * t + 1)
        for i in range(count)
        for t in range(2)
    ]


def test_a_load_alone_sets_hbm():
    found = ask(log(), Asked(TIMING, load=4.0))
    assert found.num_live == 6
    assert found.setup.hbm_tokens == round(6 * 84 / 4)
    assert found.oversubscription == pytest.approx(4.0)


def test_hbm_always_holds_the_longest_turn():
    found = ask(log(), Asked(TIMING, load=100.0))
    assert found.setup.hbm_tokens == 84 + 2 * 4
    assert found.oversubscription < 100
    assert found.assumptions[0].endswith("not the 100 that was asked for: HBM holds the longest turn at least")


def test_a_load_of_more_than_all_tasks_is_said_to_be_less():
    found = ask(log(), Asked(TIMING, hbm_tokens=200, load=9.0))
    assert found.num_live == 6
    assert found.assumptions[0] == "the load is 2.5, not the 9 that was asked for: there are no more tasks"
    assert not any("asked for:" in line for line in ask(log(), Asked(TIMING, hbm_tokens=100, load=2.0)).assumptions)


def test_with_hbm_given_a_load_sets_how_many_are_live():
    found = ask(log(), Asked(TIMING, hbm_tokens=100, load=2.0))
    assert (found.num_live, found.setup.arrivals.num_live) == (3, 3)
    assert found.oversubscription == pytest.approx(2.52)
    assert any("3 tasks at a time" in line for line in found.assumptions)


def test_several_replicas_share_the_load():
    assert ask(log(), Asked(TIMING, num_replicas=2, hbm_tokens=100, load=2.0)).num_live == 5


def test_the_router_is_said_where_there_is_anything_to_choose():
    found = ask(log(), Asked(TIMING, num_replicas=3, hbm_tokens=100, router="round-robin", seed=5))
    assert (found.setup.router, found.setup.seed) == ("round-robin", 5)
    assert found.describe_config(5)["router"] == "round-robin"
    assert any("router round-robin, whatever the policy: each turn goes to the next" in a for a in found.assumptions)
    alone = ask(log(), Asked(TIMING, hbm_tokens=100, router="round-robin"))
    assert alone.describe_config(5)["router"] is None
    assert not any("router" in line for line in alone.assumptions)


def test_a_number_of_sessions_is_a_batch_of_them():
    found = ask(log(), Asked(TIMING, num_sessions=2))
    assert (len(found.workload.roots()), found.setup.arrivals.num_live) == (2, None)
    assert found.setup.hbm_tokens == TIMING.hbm_tokens


def test_without_either_the_working_set_is_four_times_hbm():
    found = ask(log(10), Asked(TIMING, hbm_tokens=100))
    assert found.num_live == 5
    assert found.oversubscription == pytest.approx(4.2)


def test_sessions_that_share_a_clock_start_as_recorded():
    turns = [turn(f"s{n}0", 5.0 * i, [i + 1], recording="log") for i, n in enumerate("abc")]
    found = ask(turns, Asked(TIMING))
    assert found.setup.arrivals.num_live is None
    assert any("as recorded" in line for line in found.assumptions)


def test_of_tasks_that_start_as_recorded_those_are_live_that_overlap():
    # Two at first, one of them until 48 s (two turns, a gap of 10 s); ten hours later three.
    late = 36_000.0
    turns = [
        turn(f"s{n}{t}", start_s + 10.0 * t, range(100 * i + 1, 100 * i + 11 + 10 * t), finish_s=start_s + 10.0 * t,
             recording="log")
        for i, (n, start_s) in enumerate(zip("abcde", (0.0, 1.0, late, late + 1.0, late + 2.0), strict=True))
        for t in range(2)
    ]  # fmt: skip
    found = ask(sorted(turns, key=lambda t: t.arrival_s), Asked(TIMING, hbm_tokens=100))
    assert found.num_live == 3
    assert found.oversubscription == pytest.approx(3 * 81 / 100, rel=0.1)


def test_a_sample_of_the_log_and_what_that_thins_out_is_said():
    turns = [turn(f"s{n}0", 5.0 * i, [i + 1], recording="log") for i, n in enumerate("abc")]
    said = ask(turns, Asked(TIMING, num_sessions=2)).assumptions
    assert "2 of the log's 3 tasks, picked by the seed, fewer at a time than in the recording" in said
    assert not any("picked by the seed" in line for line in ask(turns, Asked(TIMING)).assumptions)


def test_models_that_are_served_as_one_are_said():
    turns = [turn(f"s{n}0", 5.0 * i, [i + 1], model=f"model-{n}") for i, n in enumerate("ab")]
    assert any("2 models (model-a, model-b)" in line for line in ask(turns, Asked(TIMING)).assumptions)
    assert not any("models" in line for line in ask(turns[:1], Asked(TIMING)).assumptions)


def test_turns_that_the_model_would_not_take_are_said():
    short = structs.replace(TIMING, max_context_tokens=50)
    assert any("6 turns are longer than the 50 tokens" in line for line in ask(log(), Asked(short)).assumptions)
    assert not any("turns are longer" in line for line in ask(log(), Asked(TIMING)).assumptions)


def test_few_tasks_are_said_to_be_few():
    assert any("only 6 tasks" in line for line in ask(log(), Asked(TIMING)).assumptions)
    turns = [turn(f"t{i}x0", 0.0, [1000 + i]) for i in range(20)]
    assert not any("only" in line for line in ask(turns, Asked(TIMING)).assumptions)


def test_merged_blocks_and_switched_on_tiers_are_said():
    long = [turn("a0", 0.0, range(1, 1025))]
    said = ask(long, Asked(TIMING, hbm_tokens=10_000, host_tokens=400)).assumptions
    assert any("4 of the log's taken as one" in line for line in said)
    assert any("offloading connector, which is off unless asked for" in line for line in said)
    assert any("nothing below HBM, for any policy" in line for line in ask(long, Asked(TIMING, load=1.0)).assumptions)


def test_a_session_ends_before_the_turn_that_outgrows_hbm():
    found = ask(log(), Asked(TIMING, hbm_tokens=60, num_sessions=6))
    assert found.workload.num_turns() == 6
    assert any("6 turns of the log left out" in line for line in found.assumptions)


def test_hbm_for_nothing_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="--hbm-tokens 44"):
        ask(log(), Asked(TIMING, hbm_tokens=8))


def test_guessed_outputs_are_said():
    turns = [turn("sa0", 0.0, [1], output_tokens=None)]
    assert any("without an output length" in line for line in ask(turns, Asked(TIMING)).assumptions)


def test_descriptions_are_plain_data():
    found = ask(log(), Asked(TIMING, load=4.0))
    about = found.describe_workload()
    assert (about["tasks"], about["turns"], about["block_tokens"]) == (6, 12, 4)
    assert 0 < about["hit_ratio_bound"] < 1
    assert found.describe_config(3)["seed"] == 3


def test_tasks_that_overlap_are_those_of_the_first_moment_with_most():
    """Each takes 6.5 s by itself."""
    starts_s = {"a": 0.0, "b": 5.0, "c": 6.0, "d": 7.0, "e": 8.0, "f": 12.0, "g": 12.6}
    load = workload(*(replace(session(name, [8]), arrival_s=at_s) for name, at_s in starts_s.items()))
    assert [s.session_id for s in most_live(load, TIMING)] == ["b", "c", "d", "e"]
    assert not most_live(workload(), TIMING)

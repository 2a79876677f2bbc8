"""Workloads: what they hold together, and what an endless cache would compute."""

from tests.sim.scenes import session, workload
from tests.sim.test_client import family


def test_the_working_set_counts_shared_blocks_once():
    load = workload(session("a", [8, 16], output=2, stem=8), session("b", [12], output=2, stem=8))
    assert load.working_set_tokens() == 18 + 14 - 8


def test_an_endless_cache_computes_each_block_once_and_the_last_block_of_every_prompt():
    load = workload(session("a", [8, 16], output=4), session("b", [8], output=4))
    # a: 8, then 16 less its two blocks: the one that its output's last token ended was never full; b: 8.
    assert load.new_tokens() == 8 + (16 - 8) + 8


def test_a_task_is_chosen_with_all_below_it():
    load = family()
    assert [s.session_id for s in load.only(load.roots()).sessions] == ["p", "c"]
    assert load.longest_tokens() == 9

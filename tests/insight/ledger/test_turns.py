"""Records as turns of a log: who shares whose prefix, and for how long."""

from impala_vllm.insight.ledger.record import Record
from impala_vllm.insight.ledger.turns import turns


def record(name, log, **fields):
    return Record(f"aa/{name}", 100.0, 200.0, log=tuple(log), **fields)


def test_a_turn_begins_with_what_was_known_of_the_one_it_follows():
    log = [(0, 1000, 64, 40, 0, 0), (5000, 500, 128, 10, 96, 1), (9000, 500, 100, 10, 32, 2)]
    first, second, third = turns([record("t1", log)], 32)
    assert (len(first.blocks), len(first.output_blocks)) == (2, 1)
    assert second.blocks[:3] == first.blocks + first.output_blocks
    assert second.blocks[3] not in first.blocks
    assert third.blocks[0] == first.blocks[0]
    assert third.blocks[1] != first.blocks[1], "a rollback shares only what was known"
    assert (first.arrival_s, first.finish_s, second.arrival_s) == (100.0, 101.0, 105.0)


def test_traces_with_a_common_stem_share_it_and_others_share_nothing():
    opening = [(0, 10, 96, 5, 64, 0)]
    shared = turns([record("t1", opening, stem="s"), record("t2", opening, stem="s")], 32)
    assert shared[0].blocks[:2] == shared[1].blocks[:2]
    assert shared[0].blocks[2] != shared[1].blocks[2]
    apart = turns([record("t1", opening, stem="s"), record("t2", opening, stem="r")], 32)
    assert not set(apart[0].blocks) & set(apart[1].blocks)


def test_turns_that_vllm_never_counted_are_left_out():
    found = turns([record("t1", [(0, 10, 64, 5, 0, 0), (20, 10, 0, 0, 64, 1), (40, 10, 96, 5, 64, 2)])], 32)
    assert [t.request_id for t in found] == ["aa/t1/0", "aa/t1/2"]
    assert found[1].blocks[:2] == found[0].blocks

"""Gaps, lives and replays, without sockets: what is believed must always be true."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impala_vllm.fleet.events import Stored
from impala_vllm.fleet.events import follower as follower_module
from impala_vllm.fleet.events.follower import Completeness, Follower
from impala_vllm.fleet.events.snapshot import Snapshot
from impala_vllm.fleet.places import Tier
from tests.fleet.events.publishing import CLEARED, Copies, Publisher, batch, removed, stored


def settle(follower: Follower, publisher: Publisher, dropped=frozenset(), is_up=True) -> None:
    """Answer every question; `dropped` numbers get lost on the first replay."""
    for _ in range(10):
        if follower.question is None:
            return
        question = follower.asked()
        if not is_up:
            follower.replay_failed()
            continue
        for seq, payload in publisher.replay(question.from_seq):
            if seq not in dropped:
                follower.replayed(seq, payload)
        dropped = frozenset()
        follower.replay_ended()
    raise AssertionError("it asks for ever")


def work(follower: Follower) -> None:
    while follower.has_work:
        follower.work()


def start(memory=100, can_replay=True) -> tuple[Publisher, Copies, Follower]:
    publisher, sink = Publisher(memory), Copies()
    return publisher, sink, Follower(sink, can_replay)


def test_history_is_read_before_the_first_live_batch():
    publisher, sink, follower = start()
    for block in range(5):
        publisher.publish(stored(block))
    settle(follower, publisher)
    assert sink.blocks == publisher.truth.blocks
    assert follower.completeness is Completeness.ALL
    follower.live(*publisher.publish(removed(3)))
    assert sink.blocks == publisher.truth.blocks


def test_a_gap_is_filled_by_a_replay_and_nothing_is_forgotten():
    publisher, sink, follower = start()
    settle(follower, publisher)
    follower.live(*publisher.publish(stored(1)))
    publisher.publish(removed(1))
    follower.live(*publisher.publish(stored(2)))
    settle(follower, publisher)
    assert set(sink.blocks) == {2}
    assert sink.num_lost == 0
    assert follower.counts.replays == 2


def test_a_gap_longer_than_the_memory_forgets_the_replica():
    publisher, sink, follower = start(memory=3)
    settle(follower, publisher)
    follower.live(*publisher.publish(stored(1)))
    publisher.publish(removed(1))
    for block in range(10, 15):
        last = publisher.publish(stored(block))
    follower.live(*last)
    settle(follower, publisher)
    assert set(sink.blocks) == {12, 13, 14}
    assert follower.completeness is Completeness.PART
    assert follower.counts.losses == 1


def test_without_a_replay_a_gap_forgets_the_replica():
    publisher, sink, follower = start(can_replay=False)
    follower.live(*publisher.publish(stored(1)))
    publisher.publish(removed(1))
    follower.live(*publisher.publish(stored(2)))
    assert set(sink.blocks) == {2}
    assert follower.completeness is Completeness.PART


def test_a_new_life_is_told_from_a_duplicate():
    publisher, sink, follower = start()
    settle(follower, publisher)
    first = publisher.publish(stored(1))
    follower.live(*first)
    follower.live(*publisher.publish(stored(2)))
    follower.live(*first)
    assert follower.question is None
    assert follower.counts.duplicates == 1
    assert set(sink.blocks) == {1, 2}
    publisher.restart()
    publisher.publish(stored(7))
    follower.live(*publisher.publish(stored(8)))
    settle(follower, publisher)
    assert set(sink.blocks) == {7, 8}
    assert follower.counts.epochs == 1
    assert follower.completeness is Completeness.ALL


def test_a_new_life_that_has_got_further_than_the_old_one_is_found_out():
    publisher, sink, follower = start()
    settle(follower, publisher)
    follower.live(*publisher.publish(stored(1)))
    publisher.restart()
    for block in range(10, 15):
        last = publisher.publish(stored(block))
    follower.live(*last)
    settle(follower, publisher)
    assert sink.blocks == publisher.truth.blocks
    assert follower.counts.epochs == 1


def test_a_hole_in_the_replay_is_asked_for_again():
    publisher, sink, follower = start()
    for block in range(6):
        publisher.publish(stored(block))
    settle(follower, publisher, dropped={2, 5})
    assert sink.blocks == publisher.truth.blocks
    assert sink.num_lost == 0


def test_a_dead_replay_leaves_what_comes_live():
    publisher, sink, follower = start()
    settle(follower, publisher, is_up=False)
    publisher.publish(stored(1))
    follower.live(*publisher.publish(stored(2)))  # too late to be the first: its history is asked for
    settle(follower, publisher, is_up=False)
    follower.live(*publisher.publish(stored(3)))
    assert follower.question is None
    assert set(sink.blocks) == {3}
    assert follower.completeness is Completeness.PART


def test_a_poisoned_batch_costs_what_was_known_and_no_more():
    publisher, sink, follower = start()
    settle(follower, publisher)
    follower.live(*publisher.publish(stored(1)))
    follower.live(1, b"\xc1 nonsense")
    assert not sink.blocks
    assert follower.counts.undecodable == 1
    follower.live(2, batch(publisher.now_s + 1, stored(2)))
    assert set(sink.blocks) == {2}
    assert follower.completeness is Completeness.PART


def test_what_is_known_without_a_connection_is_unsure_until_a_replay_has_ended():
    publisher, sink, follower = start()
    follower.disconnected()
    settle(follower, publisher)  # where replays are answered and nothing else comes
    publisher.publish(stored(1))
    follower.reconnected()
    assert follower.completeness is Completeness.NOTHING
    settle(follower, publisher)
    assert follower.completeness is Completeness.ALL
    follower.disconnected()
    assert follower.completeness is Completeness.UNSURE
    assert set(sink.blocks) == {1}  # seconds cost nothing
    publisher.publish(removed(1))
    follower.reconnected()
    assert follower.completeness is Completeness.UNSURE
    settle(follower, publisher)
    assert follower.completeness is Completeness.ALL
    assert sink.num_lost == 0
    assert not sink.blocks


def test_a_replay_that_ends_without_a_connection_makes_nothing_sure():
    publisher, _, follower = start()
    settle(follower, publisher)
    follower.live(*publisher.publish(stored(1)))
    publisher.publish(stored(2))
    follower.live(*publisher.publish(stored(3)))
    follower.disconnected()
    settle(follower, publisher)
    assert follower.completeness is Completeness.UNSURE


def test_what_was_forgotten_is_read_anew_from_whatever_life_there_is():
    for is_same in (True, False):
        publisher, sink, follower = start()
        settle(follower, publisher)
        for block in range(5):
            follower.live(*publisher.publish(stored(block)))
        follower.disconnected()
        follower.forget()
        assert (follower.completeness, follower.knows) == (Completeness.NOTHING, False)
        assert not sink.blocks
        assert not follower.wants_snapshot  # the batch that marks its moment would not come
        if not is_same:
            publisher.restart()
        publisher.publish(stored(7))
        follower.reconnected()
        settle(follower, publisher)
        assert sink.blocks == publisher.truth.blocks
        assert follower.completeness is Completeness.ALL
        assert (sink.num_lost, follower.counts.losses) == (1, 1)


def test_without_a_replay_a_new_connection_starts_with_nothing_and_is_sure():
    publisher, sink, follower = start(can_replay=False)
    follower.live(*publisher.publish(stored(1)))
    follower.disconnected()
    assert follower.completeness is Completeness.UNSURE
    follower.reconnected()
    assert not sink.blocks
    follower.live(*publisher.publish(stored(2)))
    assert follower.completeness is Completeness.PART


def taken(publisher: Publisher) -> tuple[Snapshot, tuple[int, bytes]]:
    """What an engine answers, and the batch by which it marks the moment."""
    marker = publisher.publish()
    return Snapshot(publisher.now_s, [Stored(Tier.HBM, list(publisher.truth.blocks))]), marker


def after_a_gap() -> tuple[Publisher, Copies, Follower]:
    publisher, sink, follower = start(memory=2)
    settle(follower, publisher)
    follower.live(*publisher.publish(stored(1), stored(2)))
    publisher.publish(stored(3))
    publisher.publish(removed(1))
    for block in range(10, 13):
        last = publisher.publish(stored(block))
    follower.live(*last)
    settle(follower, publisher)
    assert follower.wants_snapshot
    return publisher, sink, follower


def test_a_snapshot_makes_whole_what_no_replay_brings_back():
    publisher, sink, follower = after_a_gap()
    follower.snapshot_begins()
    assert not follower.wants_snapshot
    snapshot, marker = taken(publisher)
    follower.live(*marker)
    follower.live(*publisher.publish(removed(2)))
    follower.live(*publisher.publish(stored(20)))
    follower.snapshot_came(snapshot)
    assert not follower.wants_snapshot
    work(follower)
    assert sink.blocks == publisher.truth.blocks
    assert follower.completeness is Completeness.HBM
    assert not follower.wants_snapshot
    follower.live(*publisher.publish(removed(3)))
    assert sink.blocks == publisher.truth.blocks


def test_a_snapshot_waits_for_the_batch_that_marks_its_moment():
    publisher, sink, follower = after_a_gap()
    follower.snapshot_begins()
    before = publisher.publish(removed(12))
    snapshot, marker = taken(publisher)
    follower.snapshot_came(snapshot)
    follower.live(*before)
    assert follower.completeness is Completeness.PART
    follower.live(*marker)
    work(follower)
    assert sink.blocks == publisher.truth.blocks
    assert follower.completeness is Completeness.HBM


def test_what_comes_while_a_snapshot_is_applied_waits_behind_it(monkeypatch):
    monkeypatch.setattr(follower_module, "BLOCKS_AT_ONCE", 1)
    publisher, sink, follower = after_a_gap()
    follower.snapshot_begins()
    snapshot, marker = taken(publisher)
    follower.live(*marker)
    follower.snapshot_came(snapshot)
    follower.work()
    for event in (removed(10), stored(10), stored(21), removed(11), stored(22)):
        follower.live(*publisher.publish(event))
        follower.work()
    assert follower.completeness is Completeness.PART
    work(follower)
    assert sink.blocks == publisher.truth.blocks
    assert follower.completeness is Completeness.HBM


def test_a_loss_while_a_snapshot_is_applied_leaves_nothing_of_it():
    publisher, sink, follower = after_a_gap()
    follower.snapshot_begins()
    snapshot, marker = taken(publisher)
    follower.live(*marker)
    follower.snapshot_came(snapshot)
    publisher.restart()
    follower.reconnected()
    settle(follower, publisher)
    assert not follower.has_work
    assert not sink.blocks


def test_a_snapshot_of_an_earlier_life_is_not_taken():
    publisher, sink, follower = after_a_gap()
    follower.snapshot_begins()
    snapshot, marker = taken(publisher)
    follower.live(*marker)
    publisher.restart()
    follower.reconnected()
    settle(follower, publisher)
    follower.snapshot_came(snapshot)
    follower.live(*publisher.publish(stored(7)))
    assert set(sink.blocks) == {7}


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("srxTAWLD"), st.integers(0, 5)), max_size=40), st.integers(0, 3))
def test_snapshots_leave_nothing_false_whenever_they_come(steps, memory):
    """Store, remove, clear; take a snapshot, let it arrive, apply a part of it; lose a batch; restart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follower_module, "BLOCKS_AT_ONCE", 2)
        run(steps, memory)


def run(steps, memory) -> None:
    publisher, sink, follower = start(memory)
    settle(follower, publisher)
    on_its_way: list[Snapshot] = []

    def deliver(sent: tuple[int, bytes]) -> None:
        follower.live(*sent)
        settle(follower, publisher)

    for kind, block in steps:
        held = publisher.truth.blocks[block] > 0
        if kind == "T" and (follower.wants_snapshot or not follower._remembered):
            follower.snapshot_begins()
            snapshot, marker = taken(publisher)
            on_its_way = [snapshot]
            deliver(marker)
        elif kind == "A" and on_its_way:
            follower.snapshot_came(on_its_way.pop())
        elif kind == "W" and follower.has_work:
            follower.work()
        elif kind == "L":
            publisher.publish(removed(block) if held else stored(block))
            continue
        elif kind == "D":
            publisher.restart()
            follower.reconnected()
            settle(follower, publisher)
        elif kind in "srx" and (kind == "x" or held == (kind == "r")):
            deliver(publisher.publish({"s": stored(block), "r": removed(block), "x": CLEARED}[kind]))
        if follower.has_work:
            assert follower.completeness is Completeness.PART
        elif follower.next_seq == len(publisher.sent):
            assert sink.blocks <= publisher.truth.blocks
            if follower.completeness in (Completeness.ALL, Completeness.HBM):
                assert sink.blocks == publisher.truth.blocks


blocks = st.integers(0, 5)
moves = st.one_of(
    st.tuples(st.just("store"), blocks),
    st.tuples(st.just("remove"), blocks),
    st.tuples(st.just("clear"), st.none()),
    st.tuples(st.just("restart"), st.none()),
)
fates = st.sampled_from(["heard", "heard", "lost", "twice", "late"])


@settings(max_examples=300)
@given(st.lists(st.tuples(moves, fates, st.sets(st.integers(0, 30), max_size=4), st.booleans())), st.integers(0, 8))
def test_what_is_believed_is_true_whatever_gets_lost(steps, memory):
    publisher, sink, follower = start(memory)
    late: list[tuple[int, bytes]] = []
    for (move, block), fate, dropped, is_up in steps:
        if move == "restart":
            publisher.restart()
            late.clear()  # what an earlier connection still has comes before the next one is noticed
            follower.reconnected()
            continue
        if move == "remove" and not publisher.truth.blocks[block]:
            continue
        event = {"store": stored, "remove": removed}[move](block) if block is not None else CLEARED
        sent = publisher.publish(event)
        if fate == "late":
            late.append(sent)
        if fate not in ("heard", "twice"):
            continue
        settle(follower, publisher, dropped, is_up)
        for one in [sent, *(late if fate == "twice" else [])]:
            follower.live(*one)
            settle(follower, publisher, dropped, is_up)
        if follower.next_seq == len(publisher.sent):
            assert sink.blocks <= publisher.truth.blocks
            if follower.completeness is Completeness.ALL:
                assert sink.blocks == publisher.truth.blocks

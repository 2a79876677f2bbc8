"""The observer: arrivals and finishes to identity, and what happens when identity fails."""

import pytest

from impala_vllm.adapters.vllm.observer import MAX_LINKS, Observer
from impala_vllm.adapters.vllm.snapshot import take
from impala_vllm.core.identity import Identity, IdentityConfig
from tests.adapters.vllm.fakes import FakeParams, FakeRequest


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class FakeScheduler:
    """What a snapshot reads of a scheduler."""

    pause_state = 0
    hash_block_size = 16

    def __init__(self, observer):
        self.observer = observer

    def get_request_counts(self):
        return 1, 2

    def get_num_unfinished_requests(self):
        return 3


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def observer(clock):
    return Observer(Identity(IdentityConfig(max_traces=8)), clock=clock)


def chain(*tokens):
    return [("h", *tokens[: i + 1]) for i in range(len(tokens))]


def run(observer, request):
    observer.on_arrival(request)
    observer.on_finish(request)


def test_a_continuation_is_linked_to_its_trace(observer, clock):
    run(observer, FakeRequest("a", chain(*range(20))))
    clock.now += 2
    observer.on_arrival(FakeRequest("b", chain(*range(24)), num_prompt_tokens=120))
    (_, one), (_, two) = observer.links(0, 10)
    first, turn, second = one.link, two.turn, two.link
    assert turn == "b"
    assert second.trace_id == first.trace_id


def test_children_of_one_request_are_one_turn_that_ends_with_the_last(observer):
    children = [FakeRequest(f"{i}_a", chain(*range(20))) for i in range(3)]
    for child in children:
        observer.on_arrival(child)
    (trace,) = observer.identity.traces
    for child in children[:2]:
        observer.on_finish(child)
    assert (trace.num_turns, trace.num_running, observer.num_siblings) == (1, 1, 2)
    observer.on_finish(children[2])
    assert trace.num_running == 0


def test_without_hashes_only_explicit_sessions_are_linked(observer):
    run(observer, FakeRequest("a", _block_hasher=None))
    run(observer, FakeRequest("b", _block_hasher=None, session_id="s"))
    assert (observer.num_unlinked, observer.num_links) == (1, 1)


def test_pooling_requests_are_counted_and_left_alone(observer):
    run(observer, FakeRequest("a", chain(1), sampling_params=None))
    assert (observer.num_pooling, observer.num_links, observer.num_arrived) == (1, 0, 1)


@pytest.mark.parametrize("hook", ["arrive", "finish", "tick"])
def test_an_identity_that_raises_is_switched_off_and_never_seen_again(observer, hook, caplog):
    def explode(*_):
        raise ValueError("inner details")

    setattr(observer.identity, hook, explode)
    run(observer, FakeRequest("a", chain(1, 2)))
    observer.on_step(4)
    assert observer.identity is None
    run(observer, FakeRequest("b", chain(1, 2)))
    observer.on_step(4)
    assert observer.identity_error == "ValueError"
    assert (observer.num_arrived, observer.finished["stop"], observer.heartbeat.num_steps) == (2, 2, 2)
    assert len([r for r in caplog.records if "switched off" in r.message]) == 1
    identity = take(FakeScheduler(observer), 0, {"of": "traces"})["identity"]
    assert identity == {"on": False, "error": "ValueError"}


def test_a_finish_nobody_arrived_for_changes_nothing(observer):
    observer.on_finish(FakeRequest("ghost"))
    assert observer.num_unfinished == 0


def test_time_spent_is_counted(observer):
    run(observer, FakeRequest("a", chain(1)))
    assert observer.spent_ns > 0


def test_links_are_paged_and_bounded(observer, monkeypatch):
    for i in range(5):
        run(observer, FakeRequest(f"r{i}", chain(i)))
    assert [answered.turn for _, answered in observer.links(1, 2)] == ["r1", "r2"]
    assert observer.links(5, 2) == []
    assert observer._links.maxlen == MAX_LINKS


def test_links_are_numbered_on_after_the_oldest_are_gone(observer):
    observer._links = type(observer._links)(maxlen=3)
    for i in range(5):
        run(observer, FakeRequest(f"r{i}", chain(i)))
    assert [(n, answered.turn) for n, answered in observer.links(0, 10)] == [(3, "r2"), (4, "r3"), (5, "r4")]


def test_traces_are_paged_without_gaps_or_repeats(observer, clock):
    for i in range(7):
        clock.now += 1
        run(observer, FakeRequest(f"r{i}-0123abcd", chain(100 * i, 1)))
    scheduler, seen, after = FakeScheduler(observer), [], None
    while True:
        page = take(scheduler, 0, {"of": "traces", "limit": 3, "after": after})["page"]
        seen += [row["last_request_id"] for row in page["rows"]]
        after = page["next"]
        if after is None:
            break
    assert seen == [f"r{i}" for i in range(7)]


def test_the_table_stays_within_its_bound(observer):
    for i in range(50):
        run(observer, FakeRequest(f"r{i}", chain(100 * i, 1)))
    snapshot = take(FakeScheduler(observer), 0)
    assert sum(snapshot["identity"]["traces"].values()) == 8
    assert snapshot["identity"]["evicted"] == 42


def test_a_snapshot_holds_plain_data_only(observer):
    import msgspec

    params = FakeParams({"impala": {"tenant": "t", "session": "s"}})
    run(observer, FakeRequest("a", chain(1), sampling_params=params))
    observer.on_step(3)
    for of in ("traces", "links"):
        taken = take(FakeScheduler(observer), 0, {"of": of})
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(taken)) == taken
        assert taken["page"]["total"] == 1


def test_a_scheduler_that_is_not_observed_says_so():
    assert take(object(), 3) == {"rank": 3, "observed": False}

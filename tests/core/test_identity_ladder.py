"""Every rung of the ladder by hand, and what must hold whatever comes."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impala_vllm.core.identity import Identity, IdentityConfig
from impala_vllm.core.traces import State
from impala_vllm.core.types import Arrival, Finish, Link, Namespace, Outcome, RequestId, Source

BLOCK = 16


def chained(word: str) -> list[bytes]:
    """A block a letter; each hash stands for all before it."""
    return [word[: i + 1].encode() for i in range(len(word))]


@dataclass
class Client:
    """Sends prompts written as words, a letter a block."""

    config: IdentityConfig = field(default_factory=IdentityConfig)
    now: float = 0.0
    sent: int = 0

    def __post_init__(self) -> None:
        self.identity = Identity(self.config)

    def arrive(
        self, word: str, namespace: Namespace = Namespace(), session: str | None = None, up: str | None = None
    ) -> Link:
        self.sent += 1
        arrival = Arrival(RequestId(f"r{self.sent}"), chained(word), len(word) * BLOCK, namespace, session, up)
        link = self.identity.arrive(arrival, self.now)
        self.identity.check_invariants()
        return link

    def finish(self, word: str, outcome: Outcome = Outcome.TOOL_CALL, number: int | None = None) -> None:
        fact = Finish(RequestId(f"r{number or self.sent}"), chained(word), len(word) * BLOCK, outcome)
        self.identity.finish(fact, self.now)
        self.identity.check_invariants()

    def turn(self, word: str, output: str = "", outcome: Outcome = Outcome.TOOL_CALL, lasts: float = 1.0) -> Link:
        link = self.arrive(word)
        self.now += lasts
        self.finish(word + output, outcome)
        return link


def test_a_prompt_that_extends_the_last_one_continues_its_trace() -> None:
    client = Client()
    first = client.turn("sysask", "out")
    second = client.turn("sysaskoutmore")
    assert second.source is Source.CONTINUATION
    assert second.trace_id == first.trace_id
    assert second.previous_request_id == "r1"
    assert second.matched_blocks == 9


def test_an_output_that_comes_back_rewritten_still_continues() -> None:
    client = Client()
    first = client.turn("sysask", "thoughts")
    assert client.turn("sysaskbrief").trace_id == first.trace_id


def test_two_tasks_with_the_same_system_prompt_stay_apart() -> None:
    client = Client()
    traces = {client.turn("system" + task, "x").trace_id for task in ("aaaa", "bbbb", "cccc", "dddd")}
    assert len(traces) == 4


def test_the_same_prompt_again_while_the_first_is_open_is_a_retry() -> None:
    client = Client()
    first = client.arrive("sysask")
    again = client.arrive("sysask")
    assert (again.source, again.trace_id, again.previous_request_id) == (Source.RETRY, first.trace_id, "r1")


def items(lengths: list[int], concurrency: int, own_blocks: int, ending: bool = True) -> int:
    """Traces found in one-turn jobs of so many tokens behind the same long instructions."""
    identity = Identity(IdentityConfig())
    found: set[str] = set()
    live: list[tuple[RequestId, list[bytes], int]] = []
    for number, length in enumerate(lengths):
        blocks = chained("instructions")
        blocks += [blocks[-1] + f"{number}.{i}".encode() for i in range(own_blocks)]
        request = RequestId(f"job{number}")
        digest = number + 1 if ending else 0
        found.add(identity.arrive(Arrival(request, blocks, length, ending=digest), float(number)).trace_id)
        live.append((request, blocks, length))
        if len(live) == concurrency:
            done, blocks, length = live.pop(0)
            identity.finish(Finish(done, blocks, length + 4, Outcome.STOP), number + 0.5)
    identity.check_invariants()
    return len(found)


@pytest.mark.parametrize("concurrency", [1, 2, 16])
@pytest.mark.parametrize("own_blocks", [0, 1, 2])
def test_items_behind_the_same_instructions_are_no_conversation(concurrency: int, own_blocks: int) -> None:
    size = (len("instructions") + own_blocks) * BLOCK + 5
    assert items([size] * 50, concurrency, own_blocks) == 50
    lengths = [size + 7 * i % 11 for i in range(50)]
    # The first few may be taken for each other's next turn, until the instructions are known for what they are.
    assert items(lengths, concurrency, own_blocks) >= 47


def test_items_that_full_blocks_cannot_tell_apart_pass_for_retries_where_the_ending_is_unknown() -> None:
    assert items([len("instructions") * BLOCK + 5] * 9, 3, own_blocks=0, ending=False) == 1


def test_an_open_request_id_gets_its_first_answer_again() -> None:
    client = Client()
    first = client.arrive("sysask")
    client.sent -= 1
    assert client.arrive("sysask") == first


def test_going_back_into_the_history_is_a_rollback() -> None:
    client = Client()
    first = client.turn("ask", "one")
    client.turn("askonetwo", "three")
    back = client.turn("askonefour")
    assert (back.source, back.trace_id) == (Source.ROLLBACK, first.trace_id)


def test_leaving_the_history_of_a_running_turn_is_a_fork_with_a_parent() -> None:
    client = Client()
    first = client.turn("ask", "one")
    client.arrive("askoneleft")
    fork = client.arrive("askoneright")
    assert (fork.source, fork.parent_trace_id) == (Source.FORK, first.trace_id)
    assert fork.trace_id != first.trace_id


def test_a_history_edited_in_the_middle_of_a_long_trace_is_a_compaction() -> None:
    client = Client()
    long = 40_000 // BLOCK
    first = client.turn("s" * 10 + "a" * 10)
    client.turn("s" * 10 + "a" * 10 + "b" * long)
    client.now += 5
    edited = client.turn("s" * 10 + "c" * (long + 12))
    assert (edited.source, edited.trace_id) == (Source.COMPACTION, first.trace_id)


def test_a_compaction_that_was_none_is_undone_when_the_old_history_goes_on() -> None:
    client = Client()
    long = 40_000 // BLOCK
    old = "s" * 10 + "b" * long
    first = client.turn("s" * 10 + "b" * 10)
    client.turn(old)
    wrong = client.turn("s" * 10 + "c" * long)
    assert wrong.trace_id == first.trace_id
    assert client.turn(old + "more").trace_id == first.trace_id
    assert client.turn("s" * 10 + "c" * long + "more").trace_id != first.trace_id


def test_what_the_client_says_wins() -> None:
    client = Client()
    one = client.arrive("sysask", session="one")
    two = client.arrive("sysask", session="two")
    again = client.arrive("different", session="one")
    assert (one.source, one.confidence) == (Source.EXPLICIT, 1.0)
    assert two.trace_id != one.trace_id == again.trace_id
    assert client.arrive("child", session="three", up="one").parent_trace_id == one.trace_id


def test_namespaces_never_meet() -> None:
    client = Client()
    names = [Namespace("a"), Namespace("b"), Namespace("a", "salt"), Namespace("a", "", "model")]
    assert len({client.arrive("sysask", name, "one").trace_id for name in names}) == 4
    assert len({client.arrive("other", name).trace_id for name in names}) == 4


def test_a_child_is_attached_once_its_parent_alone_stays_silent() -> None:
    client = Client()
    parent = client.turn("parent", "call")
    client.turn("bystander", "call")
    child = client.turn("helper")
    assert child.parent_trace_id is None
    client.turn("bystandercallmore")
    later = client.turn("helpermore")
    assert (later.trace_id, later.parent_trace_id) == (child.trace_id, parent.trace_id)


def test_no_child_for_a_trace_that_asked_for_nothing_or_another_tenant() -> None:
    client = Client()
    client.turn("parent", "done", Outcome.STOP)
    client.turn("helper", outcome=Outcome.STOP)
    assert client.turn("helpermore").parent_trace_id is None


def test_an_aborted_turn_leaves_its_trace_in_reach() -> None:
    client = Client()
    first = client.arrive("ask")
    client.finish("ask", Outcome.ABORT)
    assert client.arrive("ask").trace_id == first.trace_id


def test_the_end_of_an_unknown_request_changes_nothing() -> None:
    client = Client()
    client.finish("ask", number=99)
    assert len(client.identity.traces) == 0


def test_a_silent_trace_is_forgotten_after_its_lease() -> None:
    client = Client(IdentityConfig(lease_s=10))
    first = client.turn("ask")
    client.now += 11
    assert client.turn("askmore").trace_id != first.trace_id
    assert client.identity.stats.expired_traces == 1


def test_an_open_request_outlives_the_lease() -> None:
    client = Client(IdentityConfig(lease_s=10))
    first = client.arrive("ask")
    client.now += 100
    client.identity.tick(client.now)
    assert first.trace_id in client.identity.traces


def test_bounds_hold_and_the_least_recently_active_goes_first() -> None:
    client = Client(IdentityConfig(max_traces=2))
    for word in ("aaa", "bbb", "ccc"):
        client.turn(word, outcome=Outcome.STOP)
    assert len(client.identity.traces) == 2
    assert client.turn("aaax").source is Source.NEW
    small = Client(IdentityConfig(max_blocks=6))
    for word in ("aaaa", "bbbb", "cccc"):
        small.turn(word, outcome=Outcome.STOP)
    assert small.identity.num_blocks <= 6


def test_a_trace_shows_what_it_is_doing() -> None:
    client = Client()
    client.arrive("ask")
    (trace,) = client.identity.traces
    assert trace.state is State.RUNNING
    client.finish("askcall")
    assert trace.state is State.GAP
    client.turn("askcallmore", outcome=Outcome.STOP)
    assert trace.state is State.ENDED
    assert trace.num_turns == 2


steps = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "finish"]),
        st.text("ab", max_size=6),
        st.integers(0, 1),
        st.sampled_from(Outcome),
        st.sampled_from([None, "one", "two"]),
    ),
    max_size=40,
)


@settings(max_examples=200)
@given(steps)
def test_whatever_comes_namespaces_stay_apart_bounds_hold_and_answers_repeat(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    def play() -> list[tuple[Link, int]]:
        client = Client(IdentityConfig(max_traces=6, max_blocks=20, lease_s=15))
        links: list[tuple[Link, int]] = []
        open_ids: list[tuple[int, str]] = []
        for what, word, tenant, outcome, session in steps:
            client.now += 1
            if what == "arrive":
                links.append((client.arrive(word, Namespace(str(tenant)), session), tenant))
                open_ids.append((client.sent, word))
            elif open_ids:
                number, prompt = open_ids.pop(0)
                client.finish(prompt + word, outcome, number)
            idle = [t for t in client.identity.traces if not t.num_running and not t.children]
            assert len(client.identity.traces) <= 6 or not idle
        return links

    links = play()
    assert links == play()
    tenants: dict[str, int] = {}
    for link, tenant in links:
        assert tenants.setdefault(link.trace_id, tenant) == tenant
        assert 0 <= link.confidence <= 1
        assert (link.confidence == 1) == (link.source is Source.EXPLICIT)

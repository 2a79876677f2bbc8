"""Accounts: time and tokens of traces add up, however their turns overlap, and records come when they are due."""

import random

import pytest

from impala_vllm.core.traces import Trace
from impala_vllm.core.types import Link, Namespace, Outcome, RequestId, Source, TraceId
from impala_vllm.insight.ledger.book import ROLL_S, SETTLED_S, Book, Served
from impala_vllm.insight.ledger.record import Phase, Tokens, Unlinked, digest

EPOCH_S = 1e9


class Table:
    """Traces as identity keeps them, as far as a book looks at them."""

    def __init__(self):
        self.records = []
        self.is_full = False
        self.book = Book("run", EPOCH_S, self._put)
        self.traces = {}

    def _put(self, record):
        if self.is_full:
            return False
        self.records.append(record)
        return True

    def arrive(self, name, request, now, known=0, previous=None, source=Source.CONTINUATION):
        trace = self.traces.get(name)
        if trace is None:
            trace = self.traces[name] = Trace(TraceId(name), Namespace("acme"), RequestId(request), now)
            trace.session_id = f"session of {name}"
        trace.num_running += 1
        link = Link(trace.trace_id, None, source, 0.9, 0, previous)
        self.book.arrive(request, RequestId(request), trace, link, known, now)
        return self.book.get(request)

    def finish(self, name, request, now, tokens=None, reusable=0, outcome=Outcome.STOP):
        trace = self.traces[name]
        trace.num_running -= 1
        trace.last_outcome = outcome
        self.book.finish(request, Served(tokens or Tokens(), reusable), outcome, now)

    def final(self):
        return [r for r in self.records if not isinstance(r, Unlinked) and not r.live]


@pytest.fixture
def table():
    return Table()


def test_phases_and_gaps_of_a_trace_add_up_to_its_completion_time(table):
    turn = table.arrive("t1", "a", 10.0)
    table.book.move(turn, Phase.HOLD, 11.0)
    table.book.move(turn, Phase.LOAD, 13.0)
    table.book.start(turn, 0, 0, 14.0)
    table.book.move(turn, Phase.DECODE, 18.0)
    table.finish("t1", "a", 20.0, outcome=Outcome.TOOL_CALL)
    turn = table.arrive("t1", "b", 25.5)
    table.book.start(turn, 0, 0, 25.5)
    table.finish("t1", "b", 26.0)
    table.book.tick(26.0 + SETTLED_S)
    (record,) = table.final()
    stall = record.stall
    assert (stall.queue, stall.hold, stall.load, stall.prefill, stall.decode) == (1.0, 2.0, 1.0, 4.5, 2.0)
    assert (record.gap_s, record.gaps, record.longest_gap_s) == (5.5, 1, 5.5)
    assert record.jct_s == pytest.approx(stall.total + record.gap_s)
    assert (record.start, record.turns, record.outcome) == (EPOCH_S + 10, 2, "ended")
    assert record.session == digest("session", "session of t1")
    assert record.tenant == digest("tenant", "acme")


def test_of_overlapping_turns_the_furthest_one_says_what_the_trace_does(table):
    first, second = table.arrive("t1", "a", 0.0), table.arrive("t1", "b", 0.0)
    table.book.start(first, 0, 0, 1.0)
    table.book.move(first, Phase.DECODE, 2.0)
    table.book.start(second, 0, 0, 3.0)  # while the other decodes
    table.finish("t1", "a", 4.0)
    table.finish("t1", "b", 6.0)
    table.book.tick(6.0 + SETTLED_S)
    (record,) = table.final()
    assert (record.stall.queue, record.stall.prefill, record.stall.decode) == (1.0, 3.0, 2.0)
    assert record.jct_s == record.stall.total


def test_any_history_adds_up(table):
    rng = random.Random(7)
    now, names = 0.0, [f"t{i}" for i in range(6)]
    for number in range(600):
        now += rng.expovariate(1.0)
        open_ones = [t for t in (table.book.get(f"r{i}") for i in range(number)) if t is not None]
        if rng.random() < 0.3 or not open_ones:
            table.arrive(rng.choice(names), f"r{number}", now)
            continue
        turn = rng.choice(open_ones)
        verb = rng.randrange(4)
        if verb == 0:
            table.finish(turn.account.trace.trace_id, turn.request_id, now)
        elif turn.phase in (Phase.PREFILL, Phase.DECODE):
            if verb == 1:
                table.book.preempt(turn, 5, now)
            else:
                table.book.move(turn, Phase.DECODE, now)
        elif verb == 1:
            table.book.start(turn, 0, 0, now)
        else:
            table.book.move(turn, rng.choice([Phase.HOLD, Phase.QUEUE, Phase.LOAD]), now)
        if table.book.prefilling():
            tokens = dict.fromkeys(table.book.prefilling(), 3)
            table.book.step(0.5, tokens, 3 * len(tokens) + 2)
    for turn in [t for t in (table.book.get(f"r{i}") for i in range(600)) if t is not None]:
        table.finish(turn.account.trace.trace_id, turn.request_id, now)
    table.book.tick(now + SETTLED_S)
    assert len(table.final()) == len(names)
    for record in table.final():
        assert record.stall.total + record.gap_s == pytest.approx(record.jct_s, abs=1e-2)


def test_a_step_is_shared_out_by_tokens_and_nothing_of_it_is_lost(table):
    prompt, *decoding = [table.arrive(f"t{i}", f"r{i}", 0.0) for i in range(3)]
    for turn in (prompt, *decoding):
        table.book.start(turn, 0, 0, 0.0)
    for turn in decoding:
        table.book.move(turn, Phase.DECODE, 0.0)
    table.book.step(1.0, {"r0": 8}, 10)
    table.book.step(0.5, {}, 2)
    for i in range(3):
        table.finish(f"t{i}", f"r{i}", 2.0)
    table.book.step(0.25, {}, 1)
    table.book.tick(2.0 + SETTLED_S)
    assert [record.gpu_s for record in table.final()] == pytest.approx([0.8, 0.35, 0.35])
    assert table.book.uncharged_s == 0.25


def test_tokens_computed_again_are_told_apart_by_cause(table):
    table.arrive("t1", "a", 0.0)
    table.finish("t1", "a", 1.0, Tokens(computed=100, output=28), 96)
    table.arrive("t1", "b", 2.0, known=128, previous=RequestId("a"))
    table.finish("t1", "b", 3.0, Tokens(computed=168, hbm=32, output=8), 192)
    table.arrive("t1", "c", 4.0, known=64, previous=RequestId("b"), source=Source.ROLLBACK)
    table.finish("t1", "c", 5.0, Tokens(computed=136, hbm=64), 192)
    turn = table.arrive("t1", "d", 6.0)
    table.book.start(turn, 0, 0, 6.0)
    table.book.preempt(turn, 70, 7.0)
    table.book.start(turn, 32, 4, 8.0)
    table.finish("t1", "d", 9.0)
    table.book.tick(9.0 + SETTLED_S)
    (record,) = table.final()
    assert (record.again.evicted, record.again.rewritten, record.again.preempted) == (96, 128, 38)
    assert (record.tokens.prompt, record.tokens.hbm, record.preemptions) == (500, 96, 1)
    assert [row[2:] for row in record.log] == [(100, 28, 0, 0), (200, 8, 128, 1), (200, 0, 64, 1), (0, 0, 0, 0)]


def test_requests_of_one_turn_share_its_trace_and_each_is_counted(table):
    table.arrive("t1", "0_a", 0.0)
    table.book._by_turn[RequestId("a")] = table.book._by_turn.pop(RequestId("0_a"))
    table.book.get("0_a").turn_id = RequestId("a")
    table.book.arrive("1_a", RequestId("a"), None, None, 0, 0.0)
    table.book.finish("1_a", Served(Tokens(computed=10, output=3), 0), Outcome.STOP, 1.0)
    table.finish("t1", "0_a", 2.0, Tokens(computed=10, output=4))
    table.book.tick(2.0 + SETTLED_S)
    (record,) = table.final()
    assert (record.tokens.computed, record.tokens.output, record.turns) == (20, 7, 2)


def test_requests_without_a_trace_are_counted_together(table):
    table.book.arrive("x", RequestId("x"), None, None, 0, 0.0)
    table.book.finish("x", Served(Tokens(computed=5, output=1), 0), Outcome.STOP, 1.0)
    table.book.tick(2.0)
    table.book.tick(3.0)
    (rest,) = table.records
    assert isinstance(rest, Unlinked)
    assert (rest.turns, rest.tokens.computed) == (1, 5)


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (Outcome.TOOL_CALL, "abandoned"),
        (Outcome.LENGTH, "truncated"),
        (Outcome.ABORT, "aborted"),
        (Outcome.STOP, "ended"),
    ],
)
def test_a_trace_that_is_forgotten_is_finished_as_its_last_turn_says(table, outcome, expected):
    table.arrive("t1", "a", 0.0)
    table.finish("t1", "a", 1.0, outcome=outcome)
    table.book.tick(2.0)
    assert [r.live for r in table.records] == [True]
    table.book.forget(TraceId("t1"))
    table.book.tick(3.0)
    assert [(r.live, r.outcome) for r in table.records[1:]] == [(False, expected)]
    assert len(table.book) == 0


def test_a_trace_forgotten_with_an_open_turn_is_finished_after_it(table):
    table.arrive("t1", "a", 0.0)
    table.book.forget(TraceId("t1"))
    table.book.tick(1.0)
    assert not table.final()
    table.finish("t1", "a", 2.0, Tokens(computed=3))
    table.book.tick(2.0)
    assert [r.tokens.computed for r in table.final()] == [3]


def test_a_reported_outcome_finishes_a_trace_that_asked_for_a_tool(table):
    table.arrive("t1", "a", 0.0)
    table.finish("t1", "a", 1.0, outcome=Outcome.TOOL_CALL)
    assert table.book.report(TraceId("t1"), "success", 0.5, 2.0)
    assert not table.book.report(TraceId("t2"), "success", None, 2.0)
    table.book.tick(2.0 + SETTLED_S)
    (record,) = table.final()
    assert (record.outcome, record.reported, record.score) == ("success", True, 0.5)


def test_a_finished_trace_that_goes_on_gets_another_record(table):
    table.arrive("t1", "a", 0.0)
    table.finish("t1", "a", 1.0)
    table.book.tick(1.0 + SETTLED_S)
    table.arrive("t1", "b", 400.0)
    table.finish("t1", "b", 401.0)
    table.book.forget(TraceId("t1"))
    table.book.tick(402.0)
    assert [(r.turns, r.gap_s) for r in table.final()] == [(1, 0.0), (2, 399.0)]


def test_live_records_are_made_anew_only_every_few_seconds(table):
    table.arrive("t1", "a", 0.0)
    table.arrive("t2", "b", 0.0)  # stays open: the engine never idles
    table.book.tick(ROLL_S - 0.1)
    assert not table.records
    table.book.tick(ROLL_S)
    table.book.tick(ROLL_S + 0.1)
    assert [r.trace for r in table.records] == ["run/t1", "run/t2"]
    assert [r.outcome for r in table.records] == ["running", "running"]


def test_a_record_that_is_refused_is_made_again(table):
    table.arrive("t1", "a", 0.0)
    table.finish("t1", "a", 1.0)
    table.book.forget(TraceId("t1"))
    table.is_full = True
    table.book.tick(2.0)
    table.is_full = False
    table.book.tick(3.0)
    assert len(table.final()) == 1

"""Who goes first in a tier: examples one can follow by hand, and random turns against a naive model."""

import random
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impala_vllm.core.allocator import Key
from impala_vllm.core.chains import MAX_CHAINS, STEM_SHARE, Chains
from impala_vllm.core.types import TraceId
from impala_vllm.core.worth_order import ROUND

A, B, C = TraceId("a"), TraceId("b"), TraceId("c")
LARGE = 1000


def keys(name: str, number: int, start: int = 0) -> list[Key]:
    return [f"{name}{i}".encode() for i in range(start, start + number)]


def tier(*cheapest_first: TraceId, num_chunks: int = LARGE) -> Chains:
    """A tier in which traces are worth what their order says; those not named are worth least."""
    order = {trace_id: rank for rank, trace_id in enumerate(cheapest_first, start=1)}
    return Chains(num_chunks, lambda trace_id: order.get(trace_id, 0))


def held(chains: Chains, *turns: tuple[TraceId, Sequence[Key]]) -> None:
    """Each turn's chunks are computed and stored."""
    for trace_id, chain in turns:
        chains.use(trace_id, chain)
        chains.add([key for key in chain if key not in chains], trace_id)
        chains.check_invariants()


def everything(chains: Chains) -> list[Key]:
    return chains.victims(len(chains), list)


def test_a_chain_goes_from_its_tail_to_its_root() -> None:
    chains = tier()
    held(chains, (A, keys("a", 4)))
    assert chains.victims(2, list) == [b"a3", b"a2"]
    assert everything(chains) == keys("a", 4)[::-1]


def test_the_trace_that_is_worth_least_goes_first_whatever_came_first() -> None:
    chains = tier(B, A)
    held(chains, (A, keys("a", 2)), (B, keys("b", 2)))
    assert everything(chains) == [b"b1", b"b0", b"a1", b"a0"]


def test_what_is_nobodys_goes_before_every_trace_and_tail_first() -> None:
    chains = tier(A)
    chains.add(keys("old", 2))
    chains.add(keys("new", 2))
    held(chains, (A, keys("a", 1)))
    assert everything(chains) == [b"old1", b"old0", b"new1", b"new0", b"a0"]


def test_nobodys_chunks_that_are_used_go_last_of_them_and_tail_first() -> None:
    chains = tier()
    chains.add(keys("x", 2))
    chains.add(keys("y", 2))
    chains.add(keys("x", 2, start=2))  # the same prompt, a step later
    chains.touch([*keys("x", 4), b"not here"])
    assert everything(chains) == [b"y1", b"y0", b"x3", b"x2", b"x1", b"x0"]


def test_nobodys_chunks_may_be_touched_twice_in_one_go() -> None:
    chains = tier()
    chains.add(keys("x", 3))
    chains.touch([*keys("x", 3), *keys("x", 1)])
    assert everything(chains) == [b"x2", b"x1", b"x0"]


def test_touching_leaves_a_traces_chunks_alone() -> None:
    chains = tier()
    held(chains, (A, keys("a", 2)))
    chains.touch(keys("a", 2))
    assert chains.num_of(A) == 2


def test_what_a_turn_no_longer_uses_is_superseded_at_once() -> None:
    chains = tier(A)
    held(chains, (A, keys("a", 5)))
    chains.use(A, [*keys("a", 3), *keys("z", 2)])  # compacted behind the third chunk
    assert [chains.trace_of(key) for key in keys("a", 5)] == [A, A, A, None, None]
    assert chains.victims(2, list) == [b"a4", b"a3"]


def test_without_supersession_what_a_turn_no_longer_uses_stays_its_traces() -> None:
    chains = tier(A)
    chains.supersedes = False
    held(chains, (A, keys("a", 3)))
    chains.add(keys("n", 1))
    chains.use(A, [*keys("a", 1), *keys("z", 2)])
    chains.check_invariants()
    assert chains.num_of(A) == 3
    assert everything(chains) == [b"n0", b"a2", b"a1", b"a0"]


def test_a_turn_that_grows_keeps_all_of_its_chain() -> None:
    chains = tier(A)
    held(chains, (A, keys("a", 3)), (A, keys("a", 6)))
    assert chains.num_of(A) == 6
    assert everything(chains) == keys("a", 6)[::-1]


def test_a_turn_is_told_which_of_its_chunks_are_surely_here() -> None:
    chains = tier(A)
    chains.add(keys("s", 2))
    assert chains.use(A, [*keys("s", 2), *keys("a", 3)], stem=2) == range(0)
    chains.add(keys("a", 3), A)
    assert chains.use(A, [*keys("s", 2), *keys("a", 5)], stem=2) == range(2, 5)
    assert chains.use(A, keys("z", 5)) == range(0)


def test_a_root_that_comes_back_late_is_still_the_last_to_go() -> None:
    chains = tier(A)
    held(chains, (A, keys("a", 4)))
    chains.drop(keys("a", 2))
    chains.add(keys("a", 2))  # somebody without a name stored it again
    chains.use(A, keys("a", 4))
    assert everything(chains) == keys("a", 4)[::-1]


def test_a_chunk_that_two_traces_use_is_a_stem_and_goes_after_both() -> None:
    chains = tier(A, B)
    held(chains, (A, [*keys("s", 2), *keys("a", 1)]), (B, [*keys("s", 2), *keys("b", 1)]))
    assert [chains.trace_of(key) for key in keys("s", 2)] == [None, None]
    assert everything(chains) == [b"a0", b"b0", b"s1", b"s0"]
    chains.release(A)
    chains.release(B)
    assert everything(chains)[-2:] == [b"s1", b"s0"]


def test_a_stem_that_is_known_is_nobodys_from_the_first_turn_on() -> None:
    chains = tier(A)
    chains.add(keys("s", 2))
    chains.use(A, [*keys("s", 2), *keys("a", 1)], stem=2)
    assert chains.num_of(A) == 0
    assert everything(chains) == [b"s1", b"s0"]


def test_stems_beyond_their_share_go_first_least_recently_used_and_tail_first() -> None:
    num_chunks = 12
    chains = tier(A, B, C, num_chunks=num_chunks)
    for trace_id, stem in ((A, "r"), (B, "s"), (A, "r")):
        chains.add([key for key in keys(stem, 4) if key not in chains])
        chains.use(trace_id, keys(stem, 4), stem=4)
    chains.add(keys("n", 1))
    surplus = 8 - int(STEM_SHARE * num_chunks)
    order = everything(chains)
    assert order[:surplus] == [b"s3", b"s2"]
    assert order[surplus:] == [b"n0", b"s1", b"s0", b"r3", b"r2", b"r1", b"r0"]


def test_only_what_is_worth_less_than_the_trace_itself_may_go_for_it() -> None:
    chains = tier(A, B, C)
    held(chains, (A, keys("a", 2)), (B, keys("b", 2)), (C, keys("c", 2)))
    chains.add(keys("n", 1))
    assert chains.victims(9, list, only_nobodys=True) == [b"n0"]
    assert chains.victims(9, list, only_cheaper_than=B) == [b"n0", b"a1", b"a0"]
    assert chains.victims(9, list, only_cheaper_than=A) == [b"n0"]
    nothing_here = TraceId("d")  # not named in the order: worth least
    assert chains.victims(9, list, only_cheaper_than=nothing_here) == [b"n0"]


def test_spared_traces_and_chunks_that_may_not_go_stay() -> None:
    chains = tier(A, B)
    held(chains, (A, keys("a", 2)), (B, keys("b", 3)))
    assert chains.victims(9, lambda some: [key for key in some if key != b"b2"], spared=(A,)) == [b"b1", b"b0"]


def test_chunks_of_traces_that_go_last_go_behind_all_others_but_before_stems() -> None:
    chains = tier(A, B, C)
    held(chains, (A, keys("a", 2)), (B, keys("b", 1)), (C, keys("c", 1)))
    chains.add(keys("s", 1))
    chains.use(C, [*keys("s", 1), *keys("c", 1)], 1)
    assert chains.victims(9, list, last={A, C}, spared=(C,)) == [b"b0", b"a1", b"a0", b"s0"]


def test_an_order_of_traces_is_good_for_a_round_but_for_those_whose_turns_come_or_go() -> None:
    asked: list[TraceId] = []
    worth = {A: 1.0, B: 2.0, C: 0.0}

    def ask(trace_id: TraceId) -> float:
        asked.append(trace_id)
        return worth[trace_id]

    chains = Chains(LARGE, ask)
    held(chains, (A, keys("a", 2)), (B, keys("b", ROUND + 1)))
    for _ in range(3):
        chains.drop(chains.victims(1, list))
    assert asked == [A, B]
    held(chains, (C, keys("c", 1)))
    assert chains.victims(1, list) == [b"c0"]
    assert asked == [A, B, C]
    worth[C] = 3.0
    chains.use(C, keys("c", 1))
    assert everything(chains)[-1] == b"c0"
    assert asked == [A, B, C, C]
    chains.release(A)
    assert everything(chains) == [*keys("b", ROUND)[::-1], b"c0"]
    assert sorted(asked[4:]) == [B, C], "so many went that the rest may be worth something else by now"


def test_choosing_changes_nothing() -> None:
    chains = tier(A)
    held(chains, (A, keys("a", 3)))
    assert everything(chains) == everything(chains)
    assert len(chains) == 3


def test_conversations_of_one_trace_are_told_apart() -> None:
    chains = tier(A)
    held(chains, (A, keys("a", 2)), (A, keys("x", 2)), (A, keys("a", 3)))
    assert chains.num_of(A) == 5
    # The one used last goes last.
    assert everything(chains) == [b"x1", b"x0", b"a2", b"a1", b"a0"]


def test_of_too_many_conversations_the_one_silent_longest_is_let_go() -> None:
    chains = tier(A)
    held(chains, *((A, keys(f"talk{i}-", 1)) for i in range(MAX_CHAINS + 1)))
    assert chains.trace_of(b"talk0-0") is None
    assert chains.num_of(A) == MAX_CHAINS
    assert b"talk0-0" in chains


def test_a_trace_that_is_over_leaves_its_chunks_to_nobody() -> None:
    chains = tier(A)
    held(chains, (A, keys("a", 2)), (B, keys("b", 2)))
    chains.release(A)
    chains.release(TraceId("never seen"))
    chains.check_invariants()
    assert chains.num_of(A) == 0
    assert chains.num_of(B) == 2
    chains.add(keys("stem", 2), A)
    chains.use(A, keys("stem", 2), stem=2)
    assert len(chains._stems) == 2
    chains.release_all()
    chains.check_invariants()
    assert chains.num_of(B) == 0
    assert len(chains) == 6
    assert not chains._stems


def test_lists_made_anew_are_not_taken_for_those_that_had_their_place_in_memory() -> None:
    chains = tier()
    for i in range(2000):
        trace_id = TraceId(str(i % 3))
        chains.use(trace_id, [f"{i}".encode()])
        chains.add([f"{i}".encode()], trace_id)
        assert chains.trace_of(f"{i}".encode()) == trace_id
        if i % 7 == 0:
            chains.release(trace_id)
            chains.check_invariants()


class Naive:
    """The same rules, told by a list of lists that is searched and rebuilt for everything."""

    def __init__(self, max_stems: int, worth: dict[TraceId, int]) -> None:
        self.max_stems, self.worth = max_stems, worth
        self.nobodys: list[Key] = []
        self.stems: list[Key] = []
        self.chains: dict[TraceId, list[list[Key]]] = {}

    def here(self) -> list[Key]:
        return [*self.nobodys, *self.stems, *(k for chains in self.chains.values() for c in chains for k in c)]

    def owner(self, key: Key) -> TraceId | None:
        return next((t for t, chains in self.chains.items() if any(key in c for c in chains)), None)

    def drop(self, gone: Iterable[Key]) -> None:
        lists = [self.nobodys, self.stems, *(c for chains in self.chains.values() for c in chains)]
        for held in lists:
            held[:] = [key for key in held if key not in gone]

    def add(self, fresh: Sequence[Key], trace_id: TraceId | None) -> None:
        if trace_id is not None and self.chains.get(trace_id):
            self.chains[trace_id][-1] += fresh
        else:
            self.nobodys += fresh[::-1]

    def use(self, trace_id: TraceId, used: Sequence[Key], stem: int) -> None:
        mine = self.chains.setdefault(trace_id, [])
        own = next((k for k in used[stem:] if self.owner(k) == trace_id), None)
        before = next((c for c in mine if own in c), None)
        here = [k for k in used if k in self.here()]
        old = set(before or ())
        shared = [
            k
            for k in here
            if used.index(k) < stem or k in self.stems or (k not in old and self.owner(k) not in (None, trace_id))
        ]
        chain = [k for k in here if k not in shared]
        superseded = [k for k in before or () if k not in here]
        self.drop([*here, *superseded])
        self.stems += shared[::-1]
        self.nobodys += superseded[::-1]
        mine[:] = [c for c in mine if c and c is not before]
        mine.append(chain)
        if len(mine) > MAX_CHAINS:
            self.nobodys += mine.pop(0)[::-1]

    def release(self, trace_id: TraceId) -> None:
        for chain in self.chains.pop(trace_id, []):
            self.nobodys += chain[::-1]

    def order(self, spared: Sequence[TraceId], limit: TraceId | None, last: Sequence[TraceId] = ()) -> list[Key]:
        surplus = max(0, len(self.stems) - self.max_stems)
        cheap = sorted(self.chains, key=lambda t: (t in last, self.worth[t]))
        if limit is not None:
            cheap = [t for t in cheap if self.worth[t] < self.worth[limit]]
        chains = [c for t in cheap if t not in spared for c in self.chains[t]]
        stems = self.stems[surplus:] if limit is None else []
        return [*self.stems[:surplus], *self.nobodys, *(k for c in chains for k in c[::-1]), *stems]


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32))
def test_random_turns_agree_with_a_naive_model(seed: int) -> None:
    rng = random.Random(seed)
    traces = [TraceId(name) for name in "abcd"]
    worth = {t: i for i, t in enumerate(rng.sample(traces, len(traces)))}
    num_chunks = rng.choice([6, 20])
    chains = Chains(num_chunks, worth.__getitem__)
    naive = Naive(int(STEM_SHARE * num_chunks), worth)
    histories = [keys("s", rng.randrange(3)) for _ in range(5)]
    for _ in range(50):
        verb = rng.choices(["turn", "drop", "release", "touch", "add"], [6, 2, 1, 1, 1])[0]
        trace_id = rng.choice(traces)
        if verb == "turn":
            number = rng.randrange(len(histories))
            cut = rng.randrange(len(histories[number]) + 1) if rng.random() < 0.2 else len(histories[number])
            used = histories[number] = [*histories[number][:cut], *keys(f"{rng.random()}-", rng.randrange(3))]
            stem = rng.choice([0, 0, rng.randrange(len(used) + 1)])
            surely_here = chains.use(trace_id, used, stem)
            naive.use(trace_id, used, stem)
            assert set(used[surely_here.start : surely_here.stop]) <= set(naive.here())
            fresh = [key for key in used if key not in chains][: rng.randrange(6)]
            chains.add(fresh, trace_id)
            naive.add(fresh, trace_id)
        elif verb == "drop":
            gone = naive.order((), None)[: rng.randrange(6)]
            if rng.random() < 0.2:
                gone = rng.sample(naive.here(), min(2, len(naive.here())))  # what a disk lost
            chains.drop(gone)
            naive.drop(gone)
        elif verb == "release":
            chains.release(trace_id)
            naive.release(trace_id)
        elif verb == "touch":
            used = rng.choice(histories)
            chains.touch(used)
            touched = [key for key in used if key in naive.nobodys]
            naive.drop(touched)
            naive.nobodys += touched[::-1]
        else:
            fresh = [key for key in rng.choice(histories) if key not in chains]
            chains.add(fresh)
            naive.add(fresh, None)
        chains.check_invariants()
        assert len(chains) == len(naive.here())
        assert all(chains.trace_of(key) == naive.owner(key) for key in naive.here())
        spared = rng.sample(traces, rng.randrange(3))
        limit = rng.choice([None, *traces])
        last = rng.sample(traces, rng.randrange(3))
        assert chains.victims(LARGE, list, spared, limit, last) == naive.order(spared, limit, last)


@pytest.mark.parametrize("num", [0, 1, 3, 99])
def test_no_more_victims_than_asked_for(num: int) -> None:
    chains = tier(A)
    held(chains, (A, keys("a", 3)))
    assert len(chains.victims(num, list)) == min(num, 3)
